"""Schemas of the operators `hf_hyper::decode`, `matmul`, `matmul_experts` and `embedding`.

    decode(Tensor[] tensors, str scheme, ScalarType dtype) -> Tensor       [out_features, in_features]
    matmul(Tensor x, Tensor[] tensors, str scheme) -> Tensor               [..., in_features] -> [..., out_features]
    matmul_experts(Tensor x, Tensor ids, Tensor[] tensors, str scheme)     [rows, in_features] -> [rows, out_features]
    embedding(Tensor index, Tensor[] tensors, str scheme, ScalarType dtype) -> Tensor       [...] -> [..., in_features]

`tensors` are those of `codec.tensor_specs(scheme)` in its order, for `matmul_experts` with a dimension of experts in
front; `scheme` is `TensorScheme.key`. Registering them with torch.library lets `torch.compile` see one opaque call with
known shapes. Products are differentiable with respect to `x`; the backward pass decodes the weight again instead of
keeping it. Under `torch.autocast` activations are cast as those of `nn.Linear` are; stored tensors are not.

A model calls `matmul` hundreds of times a token, so it is registered kernel by kernel: `torch.library.custom_op` and
`register_autograd` take 20 microseconds a call, this takes 7.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_hyper import codec
from hf_hyper.errors import ShapeError
from hf_hyper.kernels.dispatch import select
from hf_hyper.routing import rows_by_expert
from hf_hyper.scheme import TensorScheme

__all__ = ["decode", "embedding", "matmul", "matmul_experts"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("hf_hyper", "DEF")
_library.define("decode(Tensor[] tensors, str scheme, ScalarType dtype) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("matmul(Tensor x, Tensor[] tensors, str scheme) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
for _name in ("matmul_experts", "matmul_experts_backward"):
    _library.define(
        f"{_name}(Tensor x, Tensor ids, Tensor[] tensors, str scheme) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
    )
_library.define(
    "embedding(Tensor index, Tensor[] tensors, str scheme, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_decode, _matmul = torch.ops.hf_hyper.decode.default, torch.ops.hf_hyper.matmul.default
_embedding = torch.ops.hf_hyper.embedding.default
_matmul_experts = torch.ops.hf_hyper.matmul_experts.default
_matmul_experts_backward = torch.ops.hf_hyper.matmul_experts_backward.default


def decode(tensors: list[Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    """The weight that stored tensors stand for.

    Args:
        tensors: Stored tensors in the order of `codec.tensor_specs`.
        scheme: `TensorScheme.key` of the weight.
        dtype: Floating-point dtype of the result.

    Returns:
        `[out_features, in_features]` in `dtype`.
    """
    return _decode(tensors, scheme, dtype)


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
    return _matmul(x, tensors, scheme)


def matmul_experts(x: Tensor, ids: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    """Product of every row of activations with the stored weight of its expert; other experts are not decoded.

    Args:
        x: `[rows, in_features]` float32, bfloat16 or float16.
        ids: `[rows]` int32 or int64, the expert of every row; rows of numbers outside `[0, experts)` give zeros.
        tensors: Stored tensors in the order of `codec.tensor_specs`, each with one more dimension of size `experts` in
            front, on the device of `x`.
        scheme: `TensorScheme.key` of every expert's weight.

    Returns:
        `[rows, out_features]`, dtype of `x`.

    Raises:
        ShapeError: `x` is no matrix of `in_features` columns or of another dtype, or `ids` has another length.
    """
    return _matmul_experts(x, ids, tensors, scheme)


def embedding(index: Tensor, tensors: list[Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    """Rows of the weight that stored tensors stand for.

    Args:
        index: `[...]` int32 or int64 numbers of rows, on the device of the tensors.
        tensors: Stored tensors in the order of `codec.tensor_specs`.
        scheme: `TensorScheme.key` of the weight.
        dtype: Floating-point dtype of the result.

    Returns:
        `[..., in_features]` in `dtype`.
    """
    return _embedding(index, tensors, scheme, dtype)


@functools.cache
def _prepared(operator: str, device: str, scheme: str) -> tuple[TensorScheme, tuple[str, ...], Callable[..., Tensor]]:
    """The scheme, the names of its tensors, and the implementation for it."""
    parsed = TensorScheme.parse(scheme)
    return parsed, tuple(codec.tensor_specs(parsed)), select(operator, device, parsed)


def _run_decode(tensors: list[Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    device = tensors[0].device.type
    parsed, names, implementation = _prepared("decode", device, scheme)
    with _no_autocast(device):
        return implementation(dict(zip(names, tensors, strict=True)), parsed, dtype)


def _run_matmul(x: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    device = x.device.type
    parsed, names, implementation = _prepared("matmul", device, scheme)
    _check_input(x, parsed)
    with _no_autocast(device):
        return implementation(x, dict(zip(names, tensors, strict=True)), parsed)


def _run_matmul_experts(x: Tensor, ids: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    device = x.device.type
    parsed, names, implementation = _prepared("matmul_experts", device, scheme)
    _check_rows(x, ids, parsed)
    with _no_autocast(device):
        return implementation(x, ids, dict(zip(names, tensors, strict=True)), parsed)


def _run_matmul_experts_backward(gradient: Tensor, ids: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    """Gradient of the rows from that of their products: routed experts are decoded one by one."""
    result = gradient.new_zeros(len(ids), TensorScheme.parse(scheme).in_features)
    for expert, rows in rows_by_expert(ids, len(tensors[0])):
        result[rows] = _input_gradient(gradient[rows], [tensor[expert] for tensor in tensors], scheme)
    return result


def _input_gradient(gradient: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    """Gradient `[..., in_features]` of activations from that of their products with a stored weight."""
    # Not in float16: a weight may not fit it although its products with small activations do.
    dtype = torch.float32 if gradient.dtype == torch.float16 else gradient.dtype
    return (gradient.to(dtype) @ decode(tensors, scheme, dtype)).to(gradient.dtype)


def _run_embedding(index: Tensor, tensors: list[Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    device = tensors[0].device.type
    parsed, names, implementation = _prepared("embedding", device, scheme)
    with _no_autocast(device):
        return implementation(index, dict(zip(names, tensors, strict=True)), parsed, dtype)


_nothing = contextlib.nullcontext()


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _nothing


def _decode_shape(tensors: list[Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    parsed = TensorScheme.parse(scheme)
    return tensors[0].new_empty((parsed.out_features, parsed.in_features), dtype=dtype)


def _embedding_shape(index: Tensor, tensors: list[Tensor], scheme: str, dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty((*index.shape, TensorScheme.parse(scheme).in_features), dtype=dtype)


def _matmul_shape(x: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    parsed = TensorScheme.parse(scheme)
    _check_input(x, parsed)
    return x.new_empty((*x.shape[:-1], parsed.out_features))


def _matmul_experts_shape(x: Tensor, ids: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    parsed = TensorScheme.parse(scheme)
    _check_rows(x, ids, parsed)
    return x.new_empty((x.shape[0], parsed.out_features))


def _matmul_experts_backward_shape(gradient: Tensor, ids: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    return gradient.new_empty((gradient.shape[0], TensorScheme.parse(scheme).in_features))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.scheme = scheme
        with torch._C._AutoDispatchBelowAutograd():
            return _matmul(x, tensors, scheme)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _input_gradient(grads[0], list(ctx.saved_tensors), ctx.scheme), None, None


class _ExpertsProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
        ctx.save_for_backward(ids, *tensors)
        ctx.scheme = scheme
        with torch._C._AutoDispatchBelowAutograd():
            return _matmul_experts(x, ids, tensors, scheme)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        ids, *tensors = ctx.saved_tensors
        return _matmul_experts_backward(grads[0], ids, tensors, ctx.scheme), None, None, None


def _differentiable_matmul(x: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _Product.apply(x, tensors, scheme)
    with torch._C._AutoDispatchBelowAutograd():
        return _matmul(x, tensors, scheme)


def _differentiable_matmul_experts(x: Tensor, ids: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _ExpertsProduct.apply(x, ids, tensors, scheme)
    with torch._C._AutoDispatchBelowAutograd():
        return _matmul_experts(x, ids, tensors, scheme)


def _cast(x: Tensor) -> Tensor:
    """Activations in the dtype of the autocast region they are in."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype in _DTYPES else x


def _autocast_matmul(x: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return _matmul(_cast(x), tensors, scheme)


def _autocast_matmul_experts(x: Tensor, ids: Tensor, tensors: list[Tensor], scheme: str) -> Tensor:
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return _matmul_experts(_cast(x), ids, tensors, scheme)


def _key_set(name: str) -> Any:
    return torch._C.DispatchKeySet(torch._C._dispatch_key_parse(name))


_AUTOCAST = ("AutocastCPU", "AutocastCUDA")
_AUTOCAST_KEYS = _key_set(_AUTOCAST[0]) | _key_set(_AUTOCAST[1])
for _key in _AUTOCAST:
    _library.impl("matmul", _autocast_matmul, _key)
    _library.impl("matmul_experts", _autocast_matmul_experts, _key)
_library.impl("decode", _run_decode, "CompositeExplicitAutograd")
_library.impl("embedding", _run_embedding, "CompositeExplicitAutograd")
_library.impl("matmul", _run_matmul, "CompositeExplicitAutograd")
_library.impl("matmul", _differentiable_matmul, "Autograd")
_library.impl("matmul_experts", _run_matmul_experts, "CompositeExplicitAutograd")
_library.impl("matmul_experts_backward", _run_matmul_experts_backward, "CompositeExplicitAutograd")
_library.impl("matmul_experts", _differentiable_matmul_experts, "Autograd")
torch.library.register_fake("hf_hyper::decode", _decode_shape, lib=_library)
torch.library.register_fake("hf_hyper::embedding", _embedding_shape, lib=_library)
torch.library.register_fake("hf_hyper::matmul", _matmul_shape, lib=_library)
torch.library.register_fake("hf_hyper::matmul_experts", _matmul_experts_shape, lib=_library)
torch.library.register_fake("hf_hyper::matmul_experts_backward", _matmul_experts_backward_shape, lib=_library)


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


def _check_rows(x: Tensor, ids: Tensor, scheme: TensorScheme) -> None:
    _check_input(x, scheme)
    if x.ndim != 2 or ids.ndim != 1 or ids.shape[0] != x.shape[0] or ids.dtype not in (torch.int32, torch.int64):
        raise ShapeError(
            f"rows of shape {tuple(x.shape)} with experts of shape {tuple(ids.shape)} and dtype {ids.dtype}, wanted "
            f"[rows, {scheme.in_features}] with one int32 or int64 a row"
        )
