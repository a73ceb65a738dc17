"""The two rotations around a product with `shift` weights.

`rotate` makes of activations what the codes are multiplied with: signs, the mixing of `rotation/hadamard.py`, and
float16 with a power of two for every token, so that nothing overflows whatever the dtype of the activations. A row of n
numbers is taken as a matrix [p, q], q the power of two up to 128 that divides n; the mixing is `left @ row @ right`
with a small matrix on either side, which tensor cores do. Float32 activations become two float16 parts, the second
holding what the first rounds off; products treat them as tokens of their own.

`finish` adds the partial products, takes out the bias of the codes, scales, and turns the output side back: blocks of
at most 128 rows, a product with one small matrix.

Both hold their matrices in float32 and multiply with three products of tf32 where the device has it: nearly float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_hyper._triton.library import interpreted, on_device

__all__ = ["finish", "rotate"]

RIGHT_COLUMNS = 16
"""Columns of the row's matrix that one program writes: a single token keeps several multiprocessors busy."""

LEFT_ROWS = 32
"""Rows of the row's matrix that a program holds at a time."""

FINISH_TOKENS = 16


@triton.jit(do_not_specialize=["tokens"])
def _rotate(x, signs, left, right, out, sums, units, tokens, features, width, P, BLOCKS: tl.constexpr,
            PADDED_P: tl.constexpr, STEP: tl.constexpr, Q: tl.constexpr, COLUMNS: tl.constexpr, ROOT: tl.constexpr,
            PARTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x [tokens, features] -> out [PARTS, tokens, BLOCKS * width] float16, sums [tokens, programs], units [tokens]."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q = tl.arange(0, Q)[None, :]
    largest = 0.0
    for first in range(0, BLOCKS * P, STEP):
        column = (first + tl.arange(0, STEP)[:, None]) * Q + q
        part = tl.load(x + token * features + column, mask=column < features, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(part.to(tl.float32))))
    # No element of a rotated block is larger than the block's norm, and that at most ROOT times its largest element.
    bound = tl.maximum(largest, 1e-30) * ROOT
    power = (bound.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # 2^floor(log2(bound))
    factor = 16384 / power

    chunk = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    right_part = tl.load(right + tl.arange(0, Q)[:, None] * Q + chunk)
    p = tl.arange(0, PADDED_P)[:, None]
    total = tl.zeros([PADDED_P, COLUMNS], tl.float32)
    for first in range(0, P, STEP):
        row = first + tl.arange(0, STEP)[:, None]
        column = block * width + row * Q + q
        ok = (row < P) & (column < features)
        part = tl.load(x + token * features + column, mask=ok, other=0.0).to(tl.float32)
        part = part * factor * tl.load(signs + column, mask=ok, other=0.0)
        across = first + tl.arange(0, STEP)[None, :]
        left_part = tl.load(left + p * P + across, mask=(p < P) & (across < P), other=0.0)
        mixed = tl.dot(part, right_part, input_precision=PRECISION)
        total = tl.dot(left_part, mixed, total, input_precision=PRECISION)

    ok = (p < P) & (chunk < Q)
    place = out + token * (BLOCKS * width) + block * width + p * Q + chunk
    half = total.to(tl.float16)
    tl.store(place, half, mask=ok)
    sum = tl.sum(tl.where(ok, half.to(tl.float32), 0.0))
    if PARTS == 2:
        rest = (total - half.to(tl.float32)).to(tl.float16)
        tl.store(place + tokens.to(tl.int64) * (BLOCKS * width), rest, mask=ok)
        sum += tl.sum(tl.where(ok, rest.to(tl.float32), 0.0))
    programs = tl.num_programs(1) * tl.num_programs(2)
    number = block * tl.num_programs(2) + tl.program_id(2)
    tl.store(sums + token * programs + number, sum)
    if number == 0:
        tl.store(units + token, power / 16384)


@triton.jit(do_not_specialize=["tokens", "parts", "out_first"])
def _finish(y, sums, units, scale, signs, out_scale, hadamard, out, offset, inverse_deviation, parts, tokens, rows,
            out_first, out_features, programs, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
            PROGRAMS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """y [parts, tokens, rows] float32 -> columns out_first .. of out [tokens, out_features]."""
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = token < tokens
    place = y + token[:, None] * rows + row[None, :]
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for _ in range(parts):
        total += tl.load(place, mask=here[:, None], other=0.0)
        place += tokens.to(tl.int64) * rows
    number = tl.arange(0, PROGRAMS)[None, :]
    bias = tl.load(sums + token[:, None] * programs + number, mask=here[:, None] & (number < programs), other=0.0)
    unit = tl.load(units + token, mask=here, other=0.0)
    factor = tl.load(scale + out_first + row).to(tl.float32) * inverse_deviation
    total = (total - (offset * tl.sum(bias, 1))[:, None]) * factor[None, :]
    matrix = tl.load(hadamard + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    total = tl.dot(total, matrix, input_precision=PRECISION)
    column = out_first + row
    inside = column < out_features
    last = tl.load(signs + column) * tl.load(out_scale + column, mask=inside, other=0.0).to(tl.float32)
    total = total * unit[:, None] * last[None, :]
    tl.store(out + token[:, None] * out_features + column[None, :], total.to(out.dtype.element_ty),
             mask=here[:, None] & inside[None, :])  # fmt: skip


def rotate(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Activations in the basis of the codes.

    Args:
        x: `[tokens, features]` float32, bfloat16 or float16, contiguous.
        signs: `[blocks * p * q]` float32, at least `features`.
        left: `[p, p]` float32 with p up to 512.
        right: `[q, q]` float32, q a power of two from 16 to 128.

    Returns:
        `[parts, tokens, padded]` float16 with one part, two for float32; the sum of both in pieces, `[tokens, pieces]`
        float32; and what one of these numbers stands for, `[tokens]` float32.
    """
    tokens, features = x.shape
    p, q = len(left), len(right)
    width, parts = p * q, 2 if x.dtype == torch.float32 else 1
    blocks, chunks = len(signs) // width, max(1, q // RIGHT_COLUMNS)
    padded_p = max(16, triton.next_power_of_2(p))
    out = torch.empty(parts, tokens, blocks * width, dtype=torch.float16, device=x.device)
    sums = torch.empty(tokens, blocks * chunks, dtype=torch.float32, device=x.device)
    units = torch.empty(tokens, dtype=torch.float32, device=x.device)
    with on_device(x):
        _rotate[(tokens, blocks, chunks)](
            x, signs, left, right, out, sums, units, tokens, features, width, p, BLOCKS=blocks, PADDED_P=padded_p,
            STEP=min(padded_p, LEFT_ROWS), Q=q, COLUMNS=RIGHT_COLUMNS, ROOT=width**0.5, PARTS=parts,
            PRECISION=_precision(), num_warps=4 if padded_p <= 64 else 8, num_stages=1,
        )  # fmt: skip
    return out, sums, units


def finish(
    y: Tensor,
    sums: Tensor,
    units: Tensor,
    scale: Tensor,
    signs: Tensor,
    out_scale: Tensor,
    hadamard: Tensor,
    out: Tensor,
    *,
    first: int,
    offset: float,
    inverse_deviation: float,
) -> None:
    """Outputs of some rows of the weight from partial products.

    Args:
        y: `[parts, tokens, rows]` float32, whole blocks of rows from row `first` on; the parts are added.
        sums: `[tokens, pieces]` of `rotate`.
        units: `[tokens]` of `rotate`.
        scale: `[padded_out]` float16, stored.
        signs: `[padded_out]` float32.
        out_scale: `[out_features]` bfloat16, stored.
        hadamard: `[block, block]` float32, block a power of two from 16 to 128.
        out: `[tokens, out_features]`; rows of the weight that do not exist are left out.
        first: Multiple of the block.
        offset: What `y` holds too much of for every unit of `sums`.
        inverse_deviation: One over the deviation of the byte sums.
    """
    parts, tokens, rows = y.shape
    block, pieces = len(hadamard), sums.shape[1]
    # The interpreter cuts bfloat16 off where devices round.
    target = out.float() if interpreted() and out.dtype == torch.bfloat16 else out
    with on_device(y):
        _finish[(rows // block, triton.cdiv(tokens, FINISH_TOKENS))](
            y, sums, units, scale, signs, out_scale, hadamard, target, offset, inverse_deviation, parts, tokens, rows,
            first, out.shape[1], pieces, BLOCK=block, TOKENS=FINISH_TOKENS,
            PROGRAMS=triton.next_power_of_2(pieces), PRECISION=_precision(),
            num_warps=8 if block > 32 else 4, num_stages=1,
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


def _precision() -> str:
    """Of products of float32 matrices: ROCm devices have no common tf32."""
    return "ieee" if interpreted() or torch.version.hip is not None else "tf32x3"
