"""What all launchers share: whether Triton is there, and facts of the device."""

import contextlib
import functools
import importlib.util
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

__all__ = [
    "copied_apart",
    "explicit_byte_sums",
    "interpreted",
    "multiprocessors",
    "obstacle",
    "on_device",
    "say_if_absent",
]

_MULTIPROCESSORS_INTERPRETED = 2
"""Small, so that tests under the interpreter meet grids of few programs."""


@functools.cache
def obstacle() -> str | None:
    """Why kernels in Triton cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@functools.cache
def say_if_absent() -> None:
    """Warn once that Triton is missing."""
    if obstacle() is not None:
        warnings.warn(
            f"hf_hyper: {obstacle()}; GPU tensors go through the torch reference, which is many times slower: "
            "pip install triton",
            RuntimeWarning,
            stacklevel=2,
        )


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def explicit_byte_sums() -> bool:
    """Whether kernels must add the bytes of a word one by one: `dp4a` exists on NVIDIA GPUs only."""
    return interpreted() or torch.version.hip is not None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a device."""
    if device.type != "cuda":
        return _MULTIPROCESSORS_INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context in which kernels are launched on the device of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def copied_apart(constant: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a tensor of the CPU that may outlive every CUDA graph.

    It is made by a thread of its own. What the calling thread allocates may go to the pool of a graph that torch is
    about to capture (`torch.compile(mode="reduce-overhead")` warms up that way), where nothing may stay behind, and
    belongs to its inference mode.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: constant.clone(memory_format=torch.contiguous_format).to(device)).result()
