"""Checks of the tensors that the compiled core multiplies."""

import torch
from torch import Tensor

from hf_hyper.errors import ConfigError, ShapeError

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`HYPER_*` of `csrc/hyper.h` by dtype."""


def stored(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`tensor`, contiguous, or an error unless it is a CPU tensor of this shape and dtype.

    Raises:
        ShapeError: It has another shape.
        ConfigError: It has another dtype or lies on another device.
    """
    if tensor.shape != shape:
        raise ShapeError(f"{name}: got shape {list(tensor.shape)}, wanted {list(shape)}")
    if tensor.dtype != dtype or not tensor.is_cpu:
        raise ConfigError(f"{name}: got {tensor.dtype} on {tensor.device}, wanted {dtype} on cpu")
    return tensor.contiguous()


def activations(x: Tensor, in_features: int) -> Tensor:
    """`x`, contiguous, or an error unless it is `[tokens, in_features]` of a dtype in `DTYPES` on the CPU.

    Raises:
        ShapeError: It has another shape.
        ConfigError: It has another dtype or lies on another device.
    """
    if x.ndim != 2 or x.shape[1] != in_features:
        raise ShapeError(f"x: got shape {list(x.shape)}, wanted [tokens, {in_features}]")
    check_dtype("x", x)
    return x.contiguous()


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise ConfigError unless `tensor` is of a dtype in `DTYPES` on the CPU."""
    if tensor.dtype not in DTYPES or not tensor.is_cpu:
        raise ConfigError(f"{name}: got {tensor.dtype} on {tensor.device}, wanted float32, bfloat16 or float16 on cpu")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise ConfigError unless the core can write to `tensor` element by element."""
    if not tensor.is_contiguous():
        raise ConfigError(f"{name}: got strides {tensor.stride()}, wanted a contiguous tensor")
