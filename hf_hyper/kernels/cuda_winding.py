"""`winding` on GPUs, in Triton.

Up to `FUSED_TOKENS` tokens straight from the codes; more on a weight decoded to bfloat16 for bfloat16 activations and
to float32 for the others, whose weights may not fit float16.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_hyper import _triton
from hf_hyper.hyperfunctions.winding import code_width, dimension, group_size
from hf_hyper.scheme import TensorScheme

__all__ = ["decode_winding", "matmul_winding", "obstacle", "way"]

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


def matmul_winding(x: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """`x @ weight.T` of `winding` without incoherence; see `reference.matmul`."""
    from hf_hyper._triton import winding

    rows = x.reshape(-1, scheme.in_features).contiguous()
    if len(rows) == 0:
        y = x.new_empty(0, scheme.out_features)
    elif way(len(rows)) == "fused":
        y = winding.products(rows, *_stored(tensors), **_constants(scheme)).to(x.dtype)
    else:
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        y = linear(rows.to(dtype), _decoded(tensors, scheme, dtype)).to(x.dtype)
    return y.view(*x.shape[:-1], scheme.out_features)


def way(tokens: int) -> str:
    """How `matmul_winding` multiplies a number of tokens: `fused` or `dense`."""
    return "fused" if tokens <= FUSED_TOKENS else "dense"


def _decoded(tensors: Mapping[str, Tensor], scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    from hf_hyper._triton import winding

    device = tensors["codes"].device
    weight = torch.empty(scheme.out_features, scheme.in_features, dtype=dtype, device=device)
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
