"""`shift` on GPUs, in Triton.

Three ways to multiply. Up to `FUSED_TOKENS` tokens, `fused`: activations into the basis of the codes, then the product
straight from the codes on tensor cores, which also turns outputs back: two launches. More, `dense`: the weight is
decoded panel by panel to float16, which holds its byte sums exactly, and multiplied by cuBLAS; outputs are turned back
in a launch of their own. From `PLAIN_TOKENS` tokens on, in bfloat16, `plain`: the weight is turned back instead of the
outputs and rounded to bfloat16, and the product is that of an uncompressed layer. All sums are float32. Nothing waits
for the device, and constants stay there from the first call on.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_hyper import _triton
from hf_hyper.codec import apply_out_scale
from hf_hyper.hyperfunctions.shift import MULTIPLIER, byte_sums
from hf_hyper.rotation.hadamard import dct_matrix, hadamard_matrix, odd_factors
from hf_hyper.rotation.hadamard import rotate as mix
from hf_hyper.rotation.incoherence import output_block, signs
from hf_hyper.scheme import TILE, TensorScheme

__all__ = ["decode_shift", "embedding_shift", "matmul_shift", "obstacle", "way"]

FUSED_TOKENS = 128
"""Most tokens multiplied straight from the codes, by one decoding of the weight. Not measured."""

PANEL_WEIGHTS = 1 << 25
"""Weights decoded at a time: 64 MiB of float16."""

DECODED_WEIGHTS = 1 << 23
"""Weights decoded at a time into their own basis: 32 MiB of float32, which the cache of an H100 holds in between."""

PLAIN_TOKENS = 1024
"""Fewest bfloat16 tokens that are multiplied with the weight in its own basis. Not measured: turning a weight back
moves as many bytes as turning the activations and float32 outputs of about so many tokens."""

DECODED_BIAS = -510.0
"""Added to byte sums in decoded panels."""


@dataclass(frozen=True)
class _Plan:
    """Constants of one shape on one device; `left`, `right` and the signs as `_triton.rotation.rotate` takes them."""

    bits: int
    left: Tensor
    right: int
    hadamard: int
    signs_in: Tensor
    signs_out: Tensor
    outer: "_Outer | None"
    mean: float
    inverse_deviation: float


@dataclass(frozen=True)
class _Outer:
    """What of the input side one launch cannot hold: products with matrices, by cuBLAS in float32, and the signs.

    Attributes:
        steps: Matrices `[m, m]` and the distance of the numbers that they mix.
        signs: `[padded_in]` int8.
    """

    steps: tuple[tuple[Tensor, int], ...]
    signs: Tensor

    def rotated(self, rows: Tensor) -> Tensor:
        """`[n, features]` to `[n, padded_in]` float32, signs first."""
        x = torch.nn.functional.pad(rows.float(), (0, len(self.signs) - rows.shape[1])) * self.signs
        for matrix, distance in self.steps:
            x = matrix @ x.view(-1, len(matrix), distance)
        return x.view(len(rows), -1)

    def unrotated(self, rows: Tensor) -> Tensor:
        """The inverse, `[n, padded_in]` float32."""
        x = rows
        for matrix, distance in self.steps:
            x = matrix.T @ x.view(-1, len(matrix), distance)
        return x.view(len(rows), -1) * self.signs


def obstacle(scheme: TensorScheme) -> str | None:
    """Why a weight cannot be multiplied here, or None."""
    if not scheme.incoherence:
        return "covers weights with incoherence only"
    return _triton.obstacle()


def decode_shift(tensors: Mapping[str, Tensor], scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    """The stored weight `[out_features, in_features]` of `shift` with incoherence; see `reference.decode`."""
    from hf_hyper._triton import shift_rows

    plan, codes = _plan(scheme, tensors["codes"].device), tensors["codes"].contiguous()
    scale, out_scale = tensors["scale"].contiguous(), tensors["out_scale"].contiguous()
    weight = torch.empty(scheme.out_features, scheme.in_features, dtype=dtype, device=codes.device)
    for first, stop in _panels(scheme, plan, DECODED_WEIGHTS):
        turned = shift_rows.blocks(
            codes[first // TILE : stop // TILE],
            scale[first:stop],
            plan.signs_out[first:stop],
            bits=plan.bits,
            multiplier=MULTIPLIER,
            block=plan.hadamard,
            offset=plan.mean,
            inverse_deviation=plan.inverse_deviation,
        )
        _unrotate(turned[: scheme.out_features - first], out_scale[first:stop], plan, weight[first:stop])
    return weight


def embedding_shift(index: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    """Rows of the weight; see `reference.embedding`."""
    from hf_hyper._triton import shift_rows

    plan = _plan(scheme, tensors["codes"].device)
    flat = index.reshape(-1).contiguous()
    turned = shift_rows.rows(
        flat,
        tensors["codes"].contiguous(),
        tensors["scale"].contiguous(),
        plan.signs_out,
        bits=plan.bits,
        multiplier=MULTIPLIER,
        block=plan.hadamard,
        out_features=scheme.out_features,
        offset=plan.mean,
        inverse_deviation=plan.inverse_deviation,
    )
    scale = tensors["out_scale"][flat.clamp(0, scheme.out_features - 1)]
    rows = torch.empty(len(flat), scheme.in_features, dtype=dtype, device=turned.device)
    _unrotate(turned, scale, plan, rows)
    return rows.view(*index.shape, scheme.in_features)


def matmul_shift(x: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """`x @ weight.T` of `shift` with incoherence; see `reference.matmul`."""
    from hf_hyper._triton import rotation, shift_matmul

    rows = x.reshape(-1, scheme.in_features).contiguous()
    out = x.new_empty(len(rows), scheme.out_features)
    if len(rows):
        if way(len(rows), x.dtype) == "plain":
            return linear(x, decode_shift(tensors, scheme, x.dtype))
        plan, codes = _plan(scheme, x.device), tensors["codes"].contiguous()
        scale, out_scale = tensors["scale"].contiguous(), tensors["out_scale"].contiguous()
        parts = 2 if x.dtype == torch.float32 else 1
        if plan.outer is not None:
            rows = plan.outer.rotated(rows)
        if way(len(rows), x.dtype) == "fused":
            counters = torch.empty(shift_matmul.blocks(scheme.padded_out), dtype=torch.int32, device=x.device)
            shift_matmul.products(
                *rotation.rotate(
                    rows, plan.signs_in, plan.left, plan.right, grouped=True, counters=counters, parts=parts
                ),
                codes,
                counters,
                scale,
                plan.signs_out,
                out_scale,
                out,
                bits=plan.bits,
                multiplier=MULTIPLIER,
                block=plan.hadamard,
                offset=plan.mean,
                inverse_deviation=plan.inverse_deviation,
            )
        else:
            rotated, sums, units = rotation.rotate(rows, plan.signs_in, plan.left, plan.right, parts=parts)
            for first, stop in _panels(scheme, plan, PANEL_WEIGHTS):
                panel = shift_matmul.decoded(codes[first // TILE : stop // TILE], plan.bits, MULTIPLIER)
                rotation.finish(
                    _product(rotated.flatten(0, 1), panel).view(parts, len(rows), -1),
                    sums,
                    units,
                    scale,
                    plan.signs_out,
                    out_scale,
                    plan.hadamard,
                    out,
                    first=first,
                    offset=plan.mean + DECODED_BIAS,
                    inverse_deviation=plan.inverse_deviation,
                )
    return out.view(*x.shape[:-1], scheme.out_features)


def way(tokens: int, dtype: torch.dtype) -> str:
    """How `matmul_shift` multiplies a number of tokens: `fused`, `dense` or `plain`."""
    if tokens <= FUSED_TOKENS:
        return "fused"
    return "plain" if dtype == torch.bfloat16 and tokens >= PLAIN_TOKENS else "dense"


def _panels(scheme: TensorScheme, plan: _Plan, weights: int) -> list[tuple[int, int]]:
    """First and last row of parts of the weight that are decoded together: whole blocks of the output rotation."""
    step = max(1, weights // (plan.hadamard * scheme.padded_in)) * plan.hadamard
    return [(first, min(first + step, scheme.padded_out)) for first in range(0, scheme.padded_out, step)]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` of float16 matrices in float32; only NVIDIA GPUs have the product with such a result."""
    if x.is_cuda and torch.version.hip is None:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def _unrotate(rows: Tensor, scale: Tensor, plan: _Plan, out: Tensor) -> None:
    """Write rows of the weight before the input rotation, `[n, padded_in]` float32, to `out` `[n, in_features]`."""
    from hf_hyper._triton import rotation

    if plan.outer is None:
        rotation.unrotate(rows, plan.signs_in, plan.left, plan.right, out, scale)
        return
    mixed = torch.empty_like(rows)
    rotation.unrotate(rows, plan.signs_in, plan.left, plan.right, mixed)
    out.copy_(apply_out_scale(plan.outer.unrotated(mixed)[:, : out.shape[1]], scale))


@functools.lru_cache(maxsize=4096)
def _plan(scheme: TensorScheme, device: torch.device) -> _Plan:
    sums = byte_sums(MULTIPLIER).double()
    width, block = scheme.padded_in // scheme.input_blocks, output_block(scheme)
    left, right, steps = _matrices(width, device)
    signs_in = _signs(scheme.seed, 0, scheme.padded_in, device)
    return _Plan(
        bits=int(scheme.bits),
        left=left,
        right=right,
        hadamard=block,
        signs_in=signs_in if not steps else _ones(scheme.padded_in, torch.int8, device),
        signs_out=_signs(scheme.seed, 1, scheme.padded_out, device),
        outer=_Outer(steps, signs_in) if steps else None,
        mean=float(sums.mean()),
        inverse_deviation=1 / float(sums.std(correction=0)),
    )


@functools.lru_cache(maxsize=256)
def _matrices(width: int, device: torch.device) -> tuple[Tensor, int, tuple[tuple[Tensor, int], ...]]:
    """Of all weights of one width: what one launch mixes, `left` and `right`, and the steps before it, if any."""
    from hf_hyper._triton import rotation

    power = width & -width
    right = min(power, rotation.MAX_POWER)
    if rotation.fits(width // right, right):
        m = width // right
        mixing = mix(torch.eye(m, device="cpu")).T * right**-0.5
        mixing = torch.nn.functional.pad(mixing, (0, rotation.padded(m) - m))
        return _apart(mixing, device), right, ()
    steps, distance = [], width
    for size in odd_factors(width):
        distance //= size
        steps.append((_apart(dct_matrix(size), device), distance))
    if power > right:
        steps.append((_hadamard(power // right, device), right))
    return _apart(torch.full((1, 1), right**-0.5, device="cpu"), device), right, tuple(steps)


@functools.lru_cache(maxsize=64)
def _hadamard(size: int, device: torch.device) -> Tensor:
    return _apart(hadamard_matrix(size), device)


@functools.lru_cache(maxsize=1024)
def _signs(seed: int, side: int, count: int, device: torch.device) -> Tensor:
    return _apart(signs(seed, side, count).to(torch.int8), device)


@functools.lru_cache(maxsize=1024)
def _ones(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _apart(torch.ones(count, dtype=dtype, device="cpu"), device)


def _apart(constant: Tensor, device: torch.device) -> Tensor:
    return _triton.copied_apart(constant, device)
