"""CPU implementations on the compiled core.

Three ways to multiply. Few tokens, `fused`: straight from the stored codes, decoding every weight once per 8 tokens;
float32 activations stay so, those of 16-bit dtypes become integers of 16 bits where the processor has fast products of
these, and `int8` makes those of a single token 8 bits. More, `dense`: every tile is decoded once into the cache and
multiplied as bfloat16, for bfloat16 activations, or as int8, where the processor has dot products of both. Otherwise
`panels`: the weight is decoded panel by panel to row-major integers, which torch multiplies with the rotated
activations; memory beyond the stored tensors stays below `PANEL_WEIGHTS` numbers plus the activations.

Panels are in bfloat16 for bfloat16 activations and in float32 for the other dtypes: bfloat16 would throw away most of
what float16 activations hold.
"""

import functools
import os
import threading
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_hyper import _native
from hf_hyper.errors import ConfigError
from hf_hyper.hyperfunctions.shift import MULTIPLIER, byte_sums
from hf_hyper.rotation.hadamard import dct_matrix, odd_factors
from hf_hyper.rotation.incoherence import output_block, signs
from hf_hyper.scheme import TILE, TensorScheme

__all__ = ["activations", "decode_shift", "matmul_shift", "set_activations", "way"]

ACTIVATIONS = ("exact", "int8")
FUSED_TOKENS = {"dense": 4, "panels": 16}
"""Most tokens for which the fused product is faster than each other way, exact or not: 4096 x 4096, 4 bits, Zen 5."""
INT8_DENSE_BITS = 4
"""Highest rate for which the dense product in int8 adds little to the error of the codes: 0.0001 beside 0.0046."""
PANEL_WEIGHTS = 1 << 21
"""Weights decoded at a time: 4 MiB in bfloat16, which stays in the last-level cache until the product reads it."""
LEAST_ROUNDED_WIDTH = 512
"""Narrower weights use float32 panels: rounding after the rotation averages out over wide ones only."""

_spaces = threading.local()
_chosen = os.environ.get("HF_HYPER_ACTIVATIONS", "exact").lower()


def set_activations(accuracy: str) -> None:
    """Choose how products hold rotated activations, for the rest of the process.

    Args:
        accuracy: `exact` for as many bits as activations have: float32 stays; in the fused product 16-bit ones may be
            rounded again, by about 2e-5, and for more tokens bfloat16 ones are, to bfloat16. `int8` for 8 bits, for
            less time: the fused product of one token then has one scale per 16 columns, about 0.5 % of relative error;
            the dense one, up to `INT8_DENSE_BITS`, one per token and up to 256 columns, and weights in 8 bits, about 1
            %. It is not the default because these add 1 % and 2.5 % to the KL divergence of SmolLM2-135M at 4 bits,
            data-free, and would add a larger share to a calibrated model's. The environment variable
            `HF_HYPER_ACTIVATIONS` sets the choice at the start.

    Raises:
        ConfigError: The word is neither.
    """
    global _chosen
    _chosen = _checked(accuracy.lower(), "set_activations")


def activations() -> str:
    """The choice in force, `exact` or `int8`.

    Raises:
        ConfigError: `HF_HYPER_ACTIVATIONS` holds another word.
    """
    return _checked(_chosen, "HF_HYPER_ACTIVATIONS")


def decode_shift(tensors: Mapping[str, Tensor], scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    """The stored weight `[out_features, in_features]` of `shift` with incoherence; see `reference.decode`."""
    direct = dtype in (torch.float32, torch.bfloat16, torch.float16)
    weight = torch.empty(
        scheme.out_features, scheme.in_features, dtype=dtype if direct else torch.float32, device="cpu"
    )
    _native.shift_decode_weight(_plan(scheme), *_stored(tensors), weight)
    return weight.to(dtype)


def matmul_shift(x: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """`x @ weight.T` of `shift` with incoherence; see `reference.matmul`."""
    plan = _plan(scheme)
    rows = x if x.ndim == 2 else x.reshape(-1, scheme.in_features)
    codes, scale, out_scale = _stored(tensors)
    way, accuracy = _way(rows.shape[0], x.dtype, plan)  # `len` of a tensor takes a microsecond
    if way == "fused":
        y = _native.shift_matmul(plan, codes, scale, out_scale, rows, int8=accuracy == "int8")
    elif way == "dense":
        y = _native.shift_matmul_dense(plan, codes, scale, out_scale, rows, int8=accuracy == "int8")
    else:
        y = _matmul_panels(rows, plan, codes, scale, out_scale)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], scheme.out_features)


def way(tokens: int, dtype: torch.dtype, scheme: TensorScheme) -> tuple[str, str]:
    """How `matmul_shift` multiplies a number of tokens: `fused`, `dense` or `panels`, and how it holds activations."""
    return _way(tokens, dtype, _plan(scheme))


def _way(tokens: int, dtype: torch.dtype, plan: _native.ShiftPlan) -> tuple[str, str]:
    if tokens <= FUSED_TOKENS["dense"]:
        return "fused", activations() if tokens == 1 else "exact"
    if tokens <= _native.dense_tokens():
        if activations() == "int8" and _wide(plan) and plan.bits <= INT8_DENSE_BITS:
            return "dense", "int8"
        if _narrow(dtype, plan):
            return "dense", "exact"
    return "fused" if tokens <= FUSED_TOKENS["panels"] else "panels", "exact"


def _matmul_panels(x: Tensor, plan: _native.ShiftPlan, codes: Tensor, scale: Tensor, out_scale: Tensor) -> Tensor:
    dtype = torch.bfloat16 if _narrow(x.dtype, plan) else torch.float32
    rotated, sums = _native.shift_rotate(plan, x, dtype)
    y = x.new_empty(len(x), plan.out_features)
    tiles, block = plan.padded_out // TILE, plan.output_block // TILE
    step = max(1, PANEL_WEIGHTS // (TILE * plan.padded_in * block)) * block  # whole blocks of the output rotation
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        panel = _panel_space(count * TILE, plan.padded_in, dtype)
        _native.shift_decode_rows(plan, codes, first, count, panel)
        _native.shift_finish(plan, linear(rotated, panel), first, sums, scale, out_scale, y)
    return y


def _narrow(dtype: torch.dtype, plan: _native.ShiftPlan) -> bool:
    return dtype == torch.bfloat16 and _wide(plan)


def _wide(plan: _native.ShiftPlan) -> bool:
    return plan.padded_in >= LEAST_ROUNDED_WIDTH


def _panel_space(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised `[rows, columns]`, in memory kept per thread: fresh pages would cost more than decoding."""
    kept: dict[torch.dtype, Tensor] = _spaces.__dict__.setdefault("by_dtype", {})
    if dtype not in kept or len(kept[dtype]) < rows * columns:
        with torch.inference_mode(False):
            kept[dtype] = torch.empty(max(rows * columns, PANEL_WEIGHTS), dtype=dtype, device="cpu")
    return kept[dtype][: rows * columns].view(rows, columns)


def _stored(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return tensors["codes"], tensors["scale"], tensors["out_scale"]


@functools.lru_cache(maxsize=4096)
def _plan(scheme: TensorScheme) -> _native.ShiftPlan:
    sums = byte_sums(MULTIPLIER).double()
    return _native.ShiftPlan(
        out_features=scheme.out_features,
        in_features=scheme.in_features,
        bits=int(scheme.bits),
        multiplier=MULTIPLIER,
        mean=float(sums.mean()),
        deviation=float(sums.std(correction=0)),
        input_blocks=scheme.input_blocks,
        output_block=output_block(scheme),
        matrices=[dct_matrix(size) for size in odd_factors(scheme.padded_in // scheme.input_blocks)],
        signs_in=signs(scheme.seed, 0, scheme.padded_in),
        signs_out=signs(scheme.seed, 1, scheme.padded_out),
    )


def _checked(accuracy: str, source: str) -> str:
    if accuracy not in ACTIVATIONS:
        raise ConfigError(f"{source}: got {accuracy!r}, wanted one of {', '.join(ACTIVATIONS)}")
    return accuracy
