"""A folder of finished tensors, so that a compression that was stopped goes on where it was.

Encoding is deterministic, so a result is known by its question: the file name is a hash of the weight's bytes, the
scheme and the effort. Files appear under their names only when complete. A block of code uses a store through
`TensorStore.use`; outside of one, `TensorStore.current()` keeps nothing.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["TensorStore"]


class TensorStore:
    """Stored tensors by question.

    Args:
        folder: Where finished tensors are kept, created when needed; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def current() -> "TensorStore":
        """The store in use."""
        return _CURRENT.get()

    @contextlib.contextmanager
    def use(self) -> Iterator["TensorStore"]:
        """Make this the current store inside a `with` block."""
        token = _CURRENT.set(self)
        try:
            yield self
        finally:
            _CURRENT.reset(token)

    def get_or_make(self, weight: Tensor, question: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Result of `make`, from the folder if it was made before.

        Args:
            weight: The tensor that is asked about.
            question: Everything else that the result depends on.
            make: Computes the result.

        Returns:
            Tensors by name, on the device of `weight`.
        """
        if self.folder is None:
            return make()
        data = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(f"{weight.dtype},{tuple(weight.shape)},{question},".encode())
        digest.update(data.data)
        path = self.folder / f"{digest.hexdigest()}.safetensors"
        if path.exists():
            return {name: tensor.to(weight.device) for name, tensor in load_file(path).items()}
        tensors = make()
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
        unfinished.replace(path)
        return tensors


_CURRENT: ContextVar[TensorStore] = ContextVar("hyper_tensor_store", default=TensorStore(None))  # noqa: B039
