"""Schemas of the operators `hf_hyper::decode` and `hf_hyper::matmul`.

    decode(Tensor[] tensors, str scheme, ScalarType dtype) -> Tensor       [out_features, in_features]
    matmul(Tensor x, Tensor[] tensors, str scheme) -> Tensor               [..., in_features] -> [..., out_features]

`tensors` are those of `codec.tensor_specs(scheme)` in its order, `scheme` is `TensorScheme.key`. Registering them with
torch.library lets `torch.compile` see one opaque call with known shapes. `matmul` is differentiable with respect to
`x`; its backward pass decodes the weight again instead of keeping it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_hyper import codec
from hf_hyper.errors import ShapeError
from hf_hyper.kernels.dispatch import select
from hf_hyper.scheme import TensorScheme

__all__ = ["decode", "matmul"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("hf_hyper::decode", mutates_args=())
def decode(tensors: list[Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    """The weight that stored tensors stand for.

    Args:
        tensors: Stored tensors in the order of `codec.tensor_specs`.
        scheme: `TensorScheme.key` of the weight.
        dtype: Floating-point dtype of the result.

    Returns:
        `[out_features, in_features]` in `dtype`.
    """
    parsed = TensorScheme.parse(scheme)
    device = tensors[0].device.type
    with torch.autocast(device, enabled=False):
        return select("decode", device, parsed)(_named(tensors, parsed), parsed, dtype)


@decode.register_fake
def _(tensors: list[Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    parsed = TensorScheme.parse(scheme)
    return tensors[0].new_empty((parsed.out_features, parsed.in_features), dtype=dtype)


@torch.library.custom_op("hf_hyper::matmul", mutates_args=())
def matmul(x: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    """Product of activations with a stored weight, rotations included.

    Args:
        x: `[..., in_features]` float32, bfloat16 or float16.
        tensors: Stored tensors in the order of `codec.tensor_specs`, on the device of `x`.
        scheme: `TensorScheme.key` of the weight.

    Returns:
        `[..., out_features]`, dtype of `x`.

    Raises:
        ShapeError: The last dimension of `x` is not `in_features`, or its dtype is another.
    """
    parsed = TensorScheme.parse(scheme)
    _check_input(x, parsed)
    with torch.autocast(x.device.type, enabled=False):
        return select("matmul", x.device.type, parsed)(x, _named(tensors, parsed), parsed)


@matmul.register_fake
def _(x: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    parsed = TensorScheme.parse(scheme)
    _check_input(x, parsed)
    return x.new_empty((*x.shape[:-1], parsed.out_features))


def _setup_context(ctx: Any, inputs: tuple[Tensor, list[Tensor], str], output: Tensor) -> None:
    x, tensors, scheme = inputs
    ctx.save_for_backward(*tensors)
    ctx.scheme, ctx.dtype = scheme, x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None]:
    tensors = list(ctx.saved_tensors)
    # In float32: a weight may not fit float16 although its products with small activations do.
    weight = decode(tensors, ctx.scheme, torch.float32)
    return (grad.float() @ weight).to(ctx.dtype), [None] * len(tensors), None


matmul.register_autograd(_backward, setup_context=_setup_context)


def _named(tensors: list[Tensor], scheme: TensorScheme) -> Mapping[str, Tensor]:
    return dict(zip(codec.tensor_specs(scheme), tensors, strict=True))


def _check_input(x: Tensor, scheme: TensorScheme) -> None:
    if x.dtype not in _DTYPES:
        raise ShapeError(
            f"input of dtype {x.dtype}, wanted one of {', '.join(map(str, _DTYPES))} for a weight of shape "
            f"[{scheme.out_features}, {scheme.in_features}]; convert it first"
        )
    if x.ndim == 0 or x.shape[-1] != scheme.in_features:
        raise ShapeError(
            f"input of shape {tuple(x.shape)}, wanted {scheme.in_features} in the last dimension for a weight of "
            f"shape [{scheme.out_features}, {scheme.in_features}]"
        )
