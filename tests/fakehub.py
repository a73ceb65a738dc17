"""The smallest Hub that huggingface_hub can upload to and load from, for tests of pushing.

It keeps repositories in memory and speaks the LFS path of the protocol (no Xet). A client must have the variables of
`FakeHub.environment` set before it imports huggingface_hub, so tests run it in a subprocess.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["FakeHub"]

_NAME = r"([^/]+/[^/]+?)"


@dataclass
class Repository:
    """Files of one repository and the commits that put them there."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])


class FakeHub:
    """A server on a free port of this machine; use it in a `with` block.

    Attributes:
        repositories: What was uploaded, by repository id; names without an owner belong to `user`.
        objects: Uploaded LFS objects by SHA-256.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that send a client here; `home` takes the place of its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_test",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        """Keep the test output clean."""

    def do_GET(self) -> None:
        """Answer by the first route whose method and pattern fit."""
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return getattr(self, answer)(body, *found.groups())
        self.send({"error": f"no route for {self.command} {path}"}, 404)

    do_POST = do_PUT = do_HEAD = do_GET

    def send(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        """Send bytes as they are and anything else as JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, kind: str) -> None:
        self.send({"error": kind}, 404, X_Error_Code=kind)

    def whoami(self, _: bytes) -> None:
        self.send({"name": "user", "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []})

    def validate(self, _: bytes) -> None:
        self.send({"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, Repository())
        self.send({"url": f"{self.hub.url}/{name}", "id": name}, status)

    def preupload(self, body: bytes, _name: str) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
        self.send(
            {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes, strict=True)]}
        )

    def batch(self, body: bytes, _name: str) -> None:
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(body)["objects"]]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/_lfs/{entry['oid']}"}}
        self.send({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, digest: str) -> None:
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.objects[digest] = body
        self.send()

    def commit(self, body: bytes, name: str) -> None:
        repository = self.hub.repositories[name]
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
        repository.commits.append(hashlib.sha1(body).hexdigest())
        sha = repository.commits[-1]
        self.send({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def tree(self, _: bytes, name: str) -> None:
        if name not in self.hub.repositories:
            return self.missing("RepoNotFound")
        files = self.hub.repositories[name].files.items()
        rows = [{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for p, d in files]
        self.send(rows)

    def about(self, _: bytes, name: str) -> None:
        if name not in self.hub.repositories:
            return self.missing("RepoNotFound")
        repository = self.hub.repositories[name]
        files = [{"rfilename": path} for path in repository.files]
        self.send({"id": name, "sha": repository.commits[-1], "private": False, "tags": [], "siblings": files})

    def resolve(self, _: bytes, name: str, path: str) -> None:
        if name not in self.hub.repositories:
            return self.missing("RepoNotFound")
        repository = self.hub.repositories[name]
        if path not in repository.files:
            return self.missing("EntryNotFound")
        data = repository.files[path]
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.send(data, X_Repo_Commit=repository.commits[-1], ETag=tag)


_READ, _WRITE = ("GET", "HEAD"), ("POST", "PUT")
_ROUTES = (
    (_READ, "/api/whoami-v2", "whoami"),
    (_WRITE, "/api/validate-yaml", "validate"),
    (_WRITE, "/api/repos/create", "create"),
    (_WRITE, f"/api/models/{_NAME}/preupload/[^/]+", "preupload"),
    (_WRITE, f"/{_NAME}\\.git/info/lfs/objects/batch", "batch"),
    (_WRITE, r"/_lfs/(\w+)", "upload"),
    (_WRITE, f"/api/models/{_NAME}/commit/[^/]+", "commit"),
    (_READ, f"/api/models/{_NAME}/tree/[^/]+", "tree"),
    (_READ, f"/api/models/{_NAME}(?:/revision/[^/]+)?", "about"),
    (_READ, f"/{_NAME}/resolve/[^/]+/(.+)", "resolve"),
)
