"""The two rotations around a product with `shift` weights.

`rotate` makes of activations what the codes are multiplied with: signs, the mixing of `rotation/hadamard.py`, and
float16 with a power of two for every token, so that nothing overflows whatever the dtype of the activations. A program
takes a block of one token, n = m · 2^a numbers, whole: it holds them in registers, transforms the 2^a by additions, and
mixes the m with a small matrix. Float32 activations become two float16 parts, the second holding what the first rounds
off.

`finish` adds partial products and turns the output side back: `finished` takes out the bias of the codes, scales, and
transforms blocks of at most 128 rows. Products that fit one launch call `finished` themselves (`shift_matmul.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_hyper._triton.hadamard import hadamard
from hf_hyper._triton.library import interpreted, on_device

__all__ = [
    "MAX_POWER",
    "finish",
    "finished",
    "fits",
    "padded",
    "partial_sum",
    "rotate",
    "rounded_by_device",
    "unrotate",
]

MAX_POWER = 1 << 13
"""Longest Walsh-Hadamard transform of one program."""

MAX_TILE = 1 << 13
"""Numbers of a program, where the m rows of 2^a are padded for a matrix product: 64 KiB of shared memory with what
exact products need."""

FEW = 8
"""Rows up to this are mixed one by one in registers instead, as many as fill `4 * MAX_TILE` numbers."""

FINISH_TOKENS, FINISH_ROWS = 16, 128

LARGEST = tl.constexpr(3.4028234663852886e38)
"""Largest finite float32 number."""

AT_ONCE = tl.constexpr(64)
"""Partial sums of a row that are loaded before the first is added: of 4 shares for 16 tokens, of one from 64 on."""


@triton.jit(do_not_specialize=["tokens", "counted"])
def _rotate(x, signs, left, out, sums, units, counters, tokens, features, stride, counted, BLOCKS: tl.constexpr,
            ROWS: tl.constexpr, PADDED: tl.constexpr, POWER: tl.constexpr, ROOT: tl.constexpr, PARTS: tl.constexpr,
            GROUPED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x [tokens, features] -> out [PARTS, tokens, stride] float16, sums [tokens, BLOCKS], units [tokens]; see `rotate`.

    PADDED is 1 where the ROWS of a block are mixed one by one.
    """
    WIDTH: tl.constexpr = ROWS * POWER
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if (token == 0) & (block == 0):
        for first in range(0, counted, POWER):
            place = first + tl.arange(0, POWER)
            tl.store(counters + place, tl.zeros([POWER], tl.int32), mask=place < counted)
    q = tl.arange(0, POWER)[None, :]
    largest = 0.0
    if BLOCKS > 1:  # the power of two belongs to the whole token
        for first in range(0, BLOCKS * WIDTH, 4096):
            column = first + tl.arange(0, 4096)
            part = tl.load(x + token * features + column, mask=column < features, other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(part.to(tl.float32))))
    pieces = ()
    for i in tl.static_range(ROWS if PADDED == 1 else 1):
        p = i + tl.arange(0, PADDED)[:, None]
        column = block * WIDTH + p * POWER + q
        ok = (p < ROWS) & (column < features)
        part = tl.load(x + token * features + column, mask=ok, other=0.0).to(tl.float32)
        if BLOCKS == 1:
            largest = tl.maximum(largest, tl.max(tl.abs(part)))
        pieces = pieces + (part * tl.load(signs + column, mask=ok, other=0).to(tl.float32),)  # noqa: RUF005
    # No element of a rotated block is larger than the block's norm, and that at most ROOT times its largest element.
    bound = tl.maximum(largest, 1e-30) * ROOT
    power = (bound.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # 2^floor(log2(bound))
    factor = 16384 / power
    mixed = ()
    for i in tl.static_range(ROWS if PADDED == 1 else 1):
        mixed = mixed + (hadamard(pieces[i] * factor, PADDED, POWER),)  # noqa: RUF005
    sum = 0.0
    for i in tl.static_range(ROWS if PADDED == 1 else 1):
        p = i + tl.arange(0, PADDED)[:, None]
        if PADDED > 1:
            matrix = tl.load(left + p * PADDED + tl.arange(0, PADDED)[None, :], mask=p < ROWS, other=0.0)
            total = tl.dot(matrix, mixed[0], input_precision=PRECISION)
        else:
            total = mixed[0] * tl.load(left + i * ROWS)
            for k in tl.static_range(1, ROWS):
                total += mixed[k] * tl.load(left + i * ROWS + k)
        column = block * WIDTH + p * POWER + q
        place = out + token * stride + (_grouped(column) if GROUPED else column)
        half = total.to(tl.float16)
        tl.store(place, half, mask=p < ROWS)
        sum += tl.sum(tl.where(p < ROWS, half.to(tl.float32), 0.0))
        if PARTS == 2:
            rest = (total - half.to(tl.float32)).to(tl.float16)
            tl.store(place + tokens.to(tl.int64) * stride, rest, mask=p < ROWS)
            sum += tl.sum(tl.where(p < ROWS, rest.to(tl.float32), 0.0))
    tl.store(sums + token * BLOCKS + block, sum)
    if block == BLOCKS - 1:
        tl.store(units + token, power / 16384)
        if GROUPED:
            tail = BLOCKS * WIDTH + tl.arange(0, 64)
            for which in tl.static_range(PARTS):
                tl.store(out + (which * tokens.to(tl.int64) + token) * stride + _grouped(tail),
                         tl.zeros([64], tl.float16), mask=tail < stride)  # fmt: skip


@triton.jit
def _unrotate(x, signs, left, scale, out, width, features, SCALED: tl.constexpr, ROWS: tl.constexpr,
              PADDED: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x [n, width] float32 -> out [n, features]; see `unrotate`. PADDED as in `_rotate`."""
    number, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q = tl.arange(0, POWER)[None, :]
    mixed = ()
    for i in tl.static_range(ROWS if PADDED == 1 else 1):
        p = i + tl.arange(0, PADDED)[:, None]
        column = block * (ROWS * POWER) + p * POWER + q
        part = tl.load(x + number * width + column, mask=p < ROWS, other=0.0)
        mixed = mixed + (hadamard(part, PADDED, POWER),)  # noqa: RUF005
    for i in tl.static_range(ROWS if PADDED == 1 else 1):
        p = i + tl.arange(0, PADDED)[:, None]
        if PADDED > 1:
            across = tl.arange(0, PADDED)[None, :]  # left, transposed
            matrix = tl.load(left + across * PADDED + p, mask=across < ROWS, other=0.0)
            total = tl.dot(matrix, mixed[0], input_precision=PRECISION)
        else:
            total = mixed[0] * tl.load(left + i)
            for k in tl.static_range(1, ROWS):
                total += mixed[k] * tl.load(left + k * ROWS + i)
        column = block * (ROWS * POWER) + p * POWER + q
        ok = (p < ROWS) & (column < features)
        total *= tl.load(signs + column, mask=ok, other=0).to(tl.float32)
        if SCALED:
            total *= tl.load(scale + number).to(tl.float32)
        total = tl.where(tl.abs(total) > LARGEST, tl.where(total > 0, LARGEST, -LARGEST), total)
        tl.store(out + number * features + column, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _grouped(column):
    """Where a column goes so that tensor cores find the operands of a lane side by side; see `shift_matmul.py`."""
    inside = (column % 16 // 4) * 16 + (column % 4 // 2) * 8 + (column % 64 // 16) * 2 + column % 2
    return column // 64 * 64 + inside


@triton.jit
def finished(total, token, row, sums, units, scale, signs, out_scale, out, offset, inverse_deviation, tokens, rows,
             out_features, pieces, BLOCK: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
             PIECES: tl.constexpr):  # fmt: skip
    """Outputs of ROWS rows of the weight from their products with TOKENS tokens.

    Args:
        total: `[TOKENS, ROWS]` float32, products in the basis of the codes.
        token: `[TOKENS]` int64.
        row: `[ROWS]`, whole blocks of BLOCK rows from a multiple of BLOCK on; those from `rows` on do not exist.
    """
    here = token < tokens
    number = tl.arange(0, PIECES)[None, :]
    bias = tl.load(sums + token[:, None] * pieces + number, mask=here[:, None] & (number < pieces), other=0.0)
    unit = tl.load(units + token, mask=here, other=0.0)
    factor = tl.load(scale + row, mask=row < rows, other=0.0).to(tl.float32) * (inverse_deviation * BLOCK**-0.5)
    total = (total - (offset * tl.sum(bias, 1))[:, None]) * factor[None, :]
    total = tl.reshape(hadamard(tl.reshape(total, [TOKENS * ROWS // BLOCK, BLOCK]), TOKENS * ROWS // BLOCK, BLOCK),
                       [TOKENS, ROWS])  # fmt: skip
    inside = (row < out_features) & (row < rows)
    last = tl.load(signs + row, mask=inside, other=0).to(tl.float32)
    last *= tl.load(out_scale + row, mask=inside, other=0.0).to(tl.float32)
    total = total * unit[:, None] * last[None, :]
    tl.store(out + token[:, None] * out_features + row[None, :], total.to(out.dtype.element_ty),
             mask=here[:, None] & inside[None, :])  # fmt: skip


@triton.jit
def partial_sum(y, token, column, parts, tokens, width, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Sum over the first dimension of y [parts, tokens, width], in its order: `[TOKENS, ROWS]`.

    Read past the first cache: other programs of the same launch may have written y.
    """
    place = y + token[:, None] * width + column[None, :]
    mask = (token < tokens)[:, None] & (column < width)[None, :]
    step = tokens.to(tl.int64) * width
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    TOGETHER: tl.constexpr = AT_ONCE // TOKENS if TOKENS < AT_ONCE else 1
    for first in range(0, parts, TOGETHER):
        loaded = ()
        for i in tl.static_range(TOGETHER):
            there = (first + i + tl.zeros([TOKENS, ROWS], tl.int32)) < parts
            some = tl.load(place + i * step, mask=mask & there, other=0.0, cache_modifier=".cg")
            loaded = loaded + (some,)  # noqa: RUF005
        for i in tl.static_range(TOGETHER):
            total += loaded[i]
        place += TOGETHER * step
    return total


@triton.jit(do_not_specialize=["tokens", "parts", "out_first"])
def _finish(y, sums, units, scale, signs, out_scale, out, offset, inverse_deviation, parts, tokens, width, out_first,
            rows, out_features, pieces, BLOCK: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
            PIECES: tl.constexpr):  # fmt: skip
    """y [parts, tokens, width] float32 -> columns out_first .. out_first + width of out [tokens, out_features]."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = partial_sum(y, token, column, parts, tokens, width, TOKENS, ROWS)
    finished(total, token, out_first + column, sums, units, scale, signs, out_scale, out, offset, inverse_deviation,
             tokens, min(rows, out_first + width), out_features, pieces, BLOCK, TOKENS, ROWS, PIECES)  # fmt: skip


def fits(rows: int, power: int) -> bool:
    """Whether `rotate` can mix blocks of `rows * power` numbers in one launch."""
    return power <= MAX_POWER and padded(rows) * power <= (4 * MAX_TILE if rows <= FEW else MAX_TILE)


def padded(rows: int) -> int:
    """Columns of the matrix `left` that mixes `rows` rows."""
    return rows if rows <= FEW else max(16, triton.next_power_of_2(rows))


def rotate(
    x: Tensor,
    signs: Tensor,
    left: Tensor,
    right: int,
    *,
    grouped: bool = False,
    counters: Tensor | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations in the basis of the codes.

    Args:
        x: `[tokens, features]` float32, bfloat16 or float16, contiguous.
        signs: `[blocks * m * right]` int8, at least `features`.
        left: `[m, padded(m)]` float32, divided by the root of `right` and padded with zeros, where `fits(m, right)`.
        right: Length of the Walsh-Hadamard transforms, a power of two from 16 on.
        grouped: Pad rows with zeros to multiples of 64 columns and order them as `shift_matmul.products` reads them.
        counters: int32 numbers that are set to zero on the way.
        parts: Float16 numbers to a number of the result: two for float32 `x`, else one, unless given.

    Returns:
        `[parts, tokens, columns]` float16; the sum of both in pieces, `[tokens, pieces]`
        float32; and what one of these numbers stands for, `[tokens]` float32.
    """
    (tokens, features), (m, width) = x.shape, left.shape
    parts = parts or (2 if x.dtype == torch.float32 else 1)
    blocks = len(signs) // (m * right)
    columns = triton.cdiv(len(signs), 64) * 64 if grouped else len(signs)
    out = torch.empty(parts, tokens, columns, dtype=torch.float16, device=x.device)
    sums = torch.empty(tokens, blocks, dtype=torch.float32, device=x.device)
    units = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if counters is None:
        counters = torch.empty(0, dtype=torch.int32, device=x.device)
    with on_device(x):
        _rotate[(tokens, blocks)](
            x, signs, left, out, sums, units, counters, tokens, features, columns,
            len(counters), BLOCKS=blocks, ROWS=m, PADDED=width if m > FEW else 1,
            POWER=right, ROOT=(m * right) ** 0.5, PARTS=parts, GROUPED=grouped, PRECISION=_precision(),
            num_warps=_warps(width * right), num_stages=1,
        )  # fmt: skip
    return out, sums, units


def unrotate(x: Tensor, signs: Tensor, left: Tensor, right: int, out: Tensor, scale: Tensor | None = None) -> None:
    """The inverse of the mixing and the signs of `rotate`, limited to finite float32; NaN stay.

    Args:
        x: `[n, blocks * m * right]` float32, contiguous.
        signs: As for `rotate`.
        left: As for `rotate`.
        right: As for `rotate`.
        out: `[n, features]`, contiguous; further columns are left out.
        scale: `[n]` bfloat16, contiguous, what rows are multiplied with.
    """
    (m, width), blocks = left.shape, x.shape[1] // (len(left) * right)
    target = rounded_by_device(out)
    if len(x):
        with on_device(x):
            _unrotate[(len(x), blocks)](
                x, signs, left, signs if scale is None else scale, target, x.shape[1], out.shape[1],
                SCALED=scale is not None, ROWS=m, PADDED=width if m > FEW else 1, POWER=right,
                PRECISION=_precision(), num_warps=_warps(width * right), num_stages=1,
            )  # fmt: skip
    if target is not out:
        out.copy_(target)


def finish(
    y: Tensor,
    sums: Tensor,
    units: Tensor,
    scale: Tensor,
    signs: Tensor,
    out_scale: Tensor,
    hadamard: int,
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
        signs: `[padded_out]` int8.
        out_scale: `[out_features]` bfloat16, stored.
        hadamard: Rows of a block, a power of two from 16 to 128.
        out: `[tokens, out_features]`; rows of the weight that do not exist are left out.
        first: Multiple of the block.
        offset: What `y` holds too much of for every unit of `sums`.
        inverse_deviation: One over the deviation of the byte sums.
    """
    parts, tokens, rows = y.shape
    pieces, target = sums.shape[1], rounded_by_device(out)
    with on_device(y):
        # Tokens first: of the other dimensions CUDA allows 65535 programs, which a million tokens would exceed.
        _finish[(triton.cdiv(tokens, FINISH_TOKENS), triton.cdiv(rows, FINISH_ROWS))](
            y, sums, units, scale, signs, out_scale, target, offset, inverse_deviation, parts, tokens, rows, first,
            len(scale), out.shape[1], pieces, BLOCK=hadamard, TOKENS=FINISH_TOKENS, ROWS=FINISH_ROWS,
            PIECES=triton.next_power_of_2(pieces), num_warps=8, num_stages=1,
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


def rounded_by_device(out: Tensor) -> Tensor:
    """Where to write what belongs to `out`: the interpreter cuts bfloat16 off where devices round."""
    return out.float() if interpreted() and out.dtype == torch.bfloat16 else out


def _warps(numbers: int) -> int:
    """Warps of a program that holds so many numbers: 16 of them a lane, more only where there would be too many."""
    return min(16, max(1, triton.next_power_of_2(numbers // 512)))


def _precision() -> str:
    """Of products of float32 matrices: ROCm devices have no common tf32."""
    return "ieee" if interpreted() or torch.version.hip is not None else "tf32x3"
