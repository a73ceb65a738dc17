"""`shift` on GPUs, in Triton.

Three launches a product: activations into the basis of the codes, the product, outputs back (`_triton/rotation.py`).
Two ways to multiply. Up to `FUSED_TOKENS` tokens, `fused`: straight from the codes on tensor cores. More, `dense`: the
weight is decoded panel by panel to float16, which holds its byte sums exactly, and multiplied by cuBLAS. All sums are
float32. Nothing waits for the device, and constants stay there from the first call on.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_hyper import _triton
from hf_hyper.codec import apply_out_scale
from hf_hyper.hyperfunctions.shift import MULTIPLIER, byte_sums
from hf_hyper.rotation.hadamard import hadamard_matrix
from hf_hyper.rotation.hadamard import rotate as mix
from hf_hyper.rotation.incoherence import output_block, signs, unrotate_weight
from hf_hyper.scheme import TILE, TensorScheme

__all__ = ["decode_shift", "matmul_shift", "obstacle", "way"]

FUSED_TOKENS = 128
"""Most tokens multiplied straight from the codes, by one decoding of the weight. Not measured."""

PANEL_WEIGHTS = 1 << 25
"""Weights decoded at a time: 64 MiB of float16."""

MAX_LEFT, MAX_RIGHT = 512, 128
"""Largest matrices of the input rotation, see `_triton/rotation.py`."""

HALF_BIAS, DECODED_BIAS = 1024.0, -510.0
"""Added to byte sums in products straight from codes and in decoded panels."""


@dataclass(frozen=True)
class _Plan:
    """Constants of one shape on one device."""

    bits: int
    left: Tensor
    right: Tensor
    hadamard: Tensor
    signs_in: Tensor
    signs_out: Tensor
    mean: float
    inverse_deviation: float


def obstacle(scheme: TensorScheme) -> str | None:
    """Why a weight cannot be multiplied here, or None."""
    if not scheme.incoherence:
        return "covers weights with incoherence only"
    if _left(scheme) > MAX_LEFT:
        return f"covers widths of at most {MAX_LEFT} times a power of two up to {MAX_RIGHT}"
    return _triton.obstacle()


def decode_shift(tensors: Mapping[str, Tensor], scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    """The stored weight `[out_features, in_features]` of `shift` with incoherence; see `reference.decode`."""
    from hf_hyper._triton import shift_matmul

    plan = _plan(scheme, tensors["codes"].device)
    values = shift_matmul.decoded(tensors["codes"], plan.bits, MULTIPLIER).float() - (plan.mean + DECODED_BIAS)
    rotated = values * (tensors["scale"].float().unsqueeze(1) * plan.inverse_deviation)
    return apply_out_scale(unrotate_weight(rotated, scheme), tensors["out_scale"]).to(dtype).contiguous()


def matmul_shift(x: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """`x @ weight.T` of `shift` with incoherence; see `reference.matmul`."""
    from hf_hyper._triton import rotation, shift_matmul

    rows = x.reshape(-1, scheme.in_features).contiguous()
    out = x.new_empty(len(rows), scheme.out_features)
    if len(rows):
        plan, codes = _plan(scheme, x.device), tensors["codes"]
        rotated, sums, units = rotation.rotate(rows, plan.signs_in, plan.left, plan.right)
        parts = len(rotated)
        rotated = rotated.flatten(0, 1)

        def finish(y: Tensor, first: int, bias: float) -> None:
            rotation.finish(
                y.view(-1, len(rows), y.shape[-1]),
                sums,
                units,
                tensors["scale"],
                plan.signs_out,
                tensors["out_scale"],
                plan.hadamard,
                out,
                first=first,
                offset=plan.mean + bias,
                inverse_deviation=plan.inverse_deviation,
            )

        if way(len(rows)) == "fused":
            finish(shift_matmul.partial_products(rotated, codes, plan.bits, MULTIPLIER), 0, HALF_BIAS)
        else:
            block = len(plan.hadamard)
            step = max(1, PANEL_WEIGHTS // (block * scheme.padded_in)) * block // TILE
            for first in range(0, len(codes), step):
                panel = shift_matmul.decoded(codes[first : first + step], plan.bits, MULTIPLIER)
                finish(_product(rotated, panel).view(parts, len(rows), -1), first * TILE, DECODED_BIAS)
    return out.view(*x.shape[:-1], scheme.out_features)


def way(tokens: int) -> str:
    """How `matmul_shift` multiplies a number of tokens: `fused` or `dense`."""
    return "fused" if tokens <= FUSED_TOKENS else "dense"


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` of float16 matrices in float32; only GPUs have the product with such a result."""
    return torch.mm(x, weight.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ weight.float().T


def _left(scheme: TensorScheme) -> int:
    width = scheme.padded_in // scheme.input_blocks
    return width // min(width & -width, MAX_RIGHT)


@functools.lru_cache(maxsize=4096)
def _plan(scheme: TensorScheme, device: torch.device) -> _Plan:
    sums = byte_sums(MULTIPLIER).double()
    left, right, hadamard = _matrices(
        _left(scheme), scheme.padded_in // scheme.input_blocks, output_block(scheme), device
    )
    return _Plan(
        bits=int(scheme.bits),
        left=left,
        right=right,
        hadamard=hadamard,
        signs_in=_signs(scheme.seed, 0, scheme.padded_in, device),
        signs_out=_signs(scheme.seed, 1, scheme.padded_out, device),
        mean=float(sums.mean()),
        inverse_deviation=1 / float(sums.std(correction=0)),
    )


@functools.lru_cache(maxsize=256)
def _matrices(left: int, width: int, block: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of all weights of one width: the left and the right matrix of the input side, the one of the output side."""
    with torch.inference_mode(False):
        return (
            mix(torch.eye(left, device="cpu")).T.contiguous().to(device),
            hadamard_matrix(width // left).to(device),
            hadamard_matrix(block).to(device),
        )


@functools.lru_cache(maxsize=1024)
def _signs(seed: int, side: int, count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return signs(seed, side, count).to(device)
