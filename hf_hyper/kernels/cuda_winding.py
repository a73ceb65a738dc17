"""`winding` on GPUs, in Triton.

Up to `FUSED_TOKENS` tokens straight from the codes; more on a weight decoded to bfloat16 for bfloat16 activations and
to float32 for the others, whose weights may not fit float16. Experts take the first way always. Nothing waits for the
device.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_hyper import _triton
from hf_hyper.hyperfunctions.winding import code_width, dimension, group_size
from hf_hyper.scheme import TensorScheme

__all__ = ["decode_winding", "embedding_winding", "matmul_experts_winding", "matmul_winding", "obstacle", "way"]

FUSED_TOKENS = 64
"""Most tokens multiplied straight from the codes, by one decoding of the weight. Not measured."""


def obstacle(scheme: TensorScheme) -> str | None:
    """Why a weight cannot be multiplied here, or None."""
    if scheme.incoherence:
        return "covers weights without incoherence only"
    if dimension(scheme) != 2 or group_size(scheme):
        return "covers pairs of weights without group scales only"
    return _triton.obstacle()


def decode_winding(tensors: Mapping[str, Tensor], scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    """The stored weight `[out_features, in_features]` of `winding` without incoherence; see `reference.decode`."""
    return _decoded(tensors, scheme, torch.float32).to(dtype)


def embedding_winding(index: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    """Rows of the weight, see `reference.embedding`; those that do not exist are NaN, for nothing waits to see it."""
    flat = index.reshape(-1)
    codes = tensors["codes"][flat.clamp(0, scheme.out_features - 1)]
    exists = (flat >= 0) & (flat < scheme.out_features)
    rows = _decoded({**tensors, "codes": codes}, scheme, torch.float32)
    rows = torch.where(exists.unsqueeze(1), rows, float("nan"))
    return rows.to(dtype).view(*index.shape, scheme.in_features)


def matmul_experts_winding(x: Tensor, ids: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """Every row of `x` times the `winding` weight of its expert; see `reference.matmul_experts`."""
    from hf_hyper._triton import winding_experts

    if len(x) == 0:
        return x.new_empty(0, scheme.out_features)
    return winding_experts.products(x.contiguous(), ids, *_stored(tensors), **_constants(scheme)).to(x.dtype)


def matmul_winding(x: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """`x @ weight.T` of `winding` without incoherence; see `reference.matmul`."""
    from hf_hyper._triton import winding

    rows = x.reshape(-1, scheme.in_features).contiguous()
    if len(rows) == 0:
        y = x.new_empty(0, scheme.out_features)
    elif way(len(rows), x.dtype) == "fused":
        y = winding.products(rows, *_stored(tensors), **_constants(scheme)).to(x.dtype)
    else:
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        y = linear(rows.to(dtype), _decoded(tensors, scheme, dtype)).to(x.dtype)
    return y.view(*x.shape[:-1], scheme.out_features)


def way(tokens: int, _: torch.dtype) -> str:
    """How `matmul_winding` multiplies a number of tokens of a dtype: `fused` or `dense`."""
    return "fused" if tokens <= FUSED_TOKENS else "dense"


def _decoded(tensors: Mapping[str, Tensor], scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    """As many rows of the weight as there are rows of codes."""
    from hf_hyper._triton import winding

    codes = tensors["codes"]
    weight = torch.empty(len(codes), scheme.in_features, dtype=dtype, device=codes.device)
    if len(codes):
        winding.decoded(*_stored(tensors), weight, **_constants(scheme))
    return weight


def _stored(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return tensors["codes"].contiguous(), tensors["centre"].contiguous(), tensors["shell_side"].contiguous()


def _constants(scheme: TensorScheme) -> dict[str, Any]:
    return {
        "width": code_width(scheme),
        "num_points": scheme.option("num_points"),
        "num_shells": scheme.option("num_shells"),
        "direction": (scheme.option("direction_0"), scheme.option("direction_1")),
    }
