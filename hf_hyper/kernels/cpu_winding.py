"""`winding` on the compiled core.

Three ways to multiply. Few tokens, `fused`: straight from the stored codes, every 8 tokens decode the weight once, sums
in float32. More, `dense`: every weight is decoded once into the cache and multiplied as bfloat16; for bfloat16
activations, where the processor has dot products of bfloat16. Otherwise `panels`: the weight is decoded panel by panel
for torch to multiply, in bfloat16 for bfloat16 activations and in float32 for the others, whose weights may not fit
float16.
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_hyper import _native
from hf_hyper.hyperfunctions.winding import code_width
from hf_hyper.scheme import TensorScheme

__all__ = ["decode_winding", "matmul_winding", "way"]

FUSED_TOKENS = {"dense": 4, "panels": 8}
"""Most tokens for which the product from the codes is faster than each other way: 4096 x 4096, one core of Zen 4."""
PANEL_WEIGHTS = 1 << 20
"""Weights decoded at a time."""


def decode_winding(tensors: Mapping[str, Tensor], scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    """The stored weight `[out_features, in_features]` of `winding` without incoherence; see `reference.decode`."""
    direct = dtype in (torch.float32, torch.bfloat16, torch.float16)
    weight = torch.empty(
        scheme.out_features, scheme.in_features, dtype=dtype if direct else torch.float32, device="cpu"
    )
    _native.winding_decode(_plan(scheme), *_stored(tensors), 0, weight)
    return weight.to(dtype)


def matmul_winding(x: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """`x @ weight.T` of `winding` without incoherence; see `reference.matmul`."""
    rows = x.reshape(-1, scheme.in_features)
    found = way(len(rows), x.dtype)
    if found == "fused":
        y = _native.winding_matmul(_plan(scheme), *_stored(tensors), rows)
    elif found == "dense":
        y = _native.winding_matmul_dense(_plan(scheme), *_stored(tensors), rows)
    else:
        y = _matmul_panels(rows, tensors, scheme)
    return y.view(*x.shape[:-1], scheme.out_features)


def way(tokens: int, dtype: torch.dtype) -> str:
    """How `matmul_winding` multiplies a number of tokens: `fused`, `dense` or `panels`."""
    if tokens <= FUSED_TOKENS["dense"]:
        return "fused"
    if dtype == torch.bfloat16 and tokens <= _native.dense_tokens():
        return "dense"
    return "fused" if tokens <= FUSED_TOKENS["panels"] else "panels"


def _matmul_panels(x: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    narrow = x.to(dtype)
    y = x.new_empty(len(x), scheme.out_features)
    step = min(max(1, PANEL_WEIGHTS // scheme.in_features), scheme.out_features)
    panel = torch.empty(step, scheme.in_features, dtype=dtype, device="cpu")
    for first in range(0, scheme.out_features, step):
        part = panel[: scheme.out_features - first]
        _native.winding_decode(_plan(scheme), *_stored(tensors), first, part)
        y[:, first : first + len(part)] = linear(narrow, part)
    return y


def _stored(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return tensors["codes"], tensors["centre"], tensors["shell_side"]


@functools.lru_cache(maxsize=4096)
def _plan(scheme: TensorScheme) -> _native.WindingPlan:
    return _native.WindingPlan(
        out_features=scheme.out_features,
        in_features=scheme.in_features,
        width=code_width(scheme),
        num_points=scheme.option("num_points"),
        num_shells=scheme.option("num_shells"),
        direction=(scheme.option("direction_0"), scheme.option("direction_1")),
    )
