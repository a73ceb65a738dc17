"""Sizes of stored tensors from the headers of safetensors files, without reading weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import get_safetensors_metadata

from hf_hyper.errors import FormatError

__all__ = ["hub_headers", "local_headers"]

Headers = dict[str, tuple[int, int]]
"""Elements and bytes of every tensor by name."""


def local_headers(folder: Path) -> tuple[Headers, int]:
    """Tensors of the checkpoint in a folder, and the size of its files in bytes.

    Raises:
        FormatError: A weight file is missing.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    headers: Headers = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FormatError(f"folder {folder} lacks {name}; save the model again or finish the download")
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for tensor, entry in header.items():
            headers[tensor] = _extent(entry["shape"], entry["data_offsets"])
    return headers, sum((folder / name).stat().st_size for name in names)


def hub_headers(repository: str) -> tuple[Headers, int]:
    """Tensors of the checkpoint in a repository on the Hub, and their size in bytes."""
    metadata = get_safetensors_metadata(repository)
    headers: Headers = {}
    for file in metadata.files_metadata.values():
        for tensor, entry in file.tensors.items():
            headers[tensor] = _extent(entry.shape, entry.data_offsets)
    return headers, sum(size for _, size in headers.values())


def _extent(shape: Sequence[int], offsets: Sequence[int]) -> tuple[int, int]:
    return torch.Size(shape).numel(), offsets[1] - offsets[0]
