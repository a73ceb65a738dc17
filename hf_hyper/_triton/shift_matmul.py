"""Products with `shift` weights straight from their codes, and their decoding for cuBLAS.

Weights enter as `1024 + byte sum`: above 1024 the last digit of float16 is worth one, so the sum of four bytes with the
bits of 1024 added is that number without a conversion. Tensor cores multiply it with float16 activations into float32;
`rotation.finished` subtracts `(1024 + mean) · (sum of activations)` and scales the rows.

A program takes a block of rows and a share of the columns, decodes each of its weights once, and multiplies it with all
tokens. A lane decodes 2 rows of 16 columns of a tile, the four lanes that a tensor core reads a row from take the same
two rows of four tiles side by side, and activations come in the order in which those lanes hold their columns, so
weights go from the registers that they are decoded in straight to the tensor cores:

    column of 64     tile j, 4 columns m, 2 columns f, e       stands at  m · 16 + f · 8 + j · 2 + e
    row of a tile    unit u, row h of it                       stands at  h · 8 + u

Shares of columns write sums of their own; the program that comes last to a block of rows adds them in their order, so
results repeat bit by bit, and finishes the outputs in the same launch. `README.md` counts instructions and launches.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_hyper._triton.library import explicit_byte_sums, multiprocessors, on_device
from hf_hyper._triton.rotation import finished, partial_sum, rounded_by_device
from hf_hyper._triton.shift_code import biased_byte_sums, tile_rows, unit_words, windows

__all__ = ["ACROSS", "DOWN", "MAX_TOKENS", "blocks", "decoded", "multiplied", "products", "steps_each", "weight_row"]

MAX_TOKENS = 128
"""Tokens that one decoding of the weight serves."""

DOWN, ACROSS = 8, 4
"""Tiles of a step of a program: 128 rows and 64 columns, one unit of 32 weights for each of 256 threads."""

RESIDENT = 3
"""Programs that keep a multiprocessor busy; fewer wait for memory. Four fit (64 registers a thread)."""

START, ADDED, MOVED = 1.0, 0.33, 1 / 760
"""In steps of a program on a busy multiprocessor: what beginning a program costs, adding one share's sums for up to 16
tokens, and moving those of one token and block of rows to the cache of the device and back, 1 KiB at 4 TB/s."""


@triton.jit
def multiplied(x_token, part_step, codes, tile_row, begin, end, tile_rows_total, tile_columns, BITS: tl.constexpr,
               MULTIPLIER: tl.constexpr, EXPLICIT: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
               DOWN: tl.constexpr, ACROSS: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Products of `DOWN` rows of tiles from `tile_row` on with tokens, over the steps from `begin` to `end`.

    Args:
        x_token: `[TOKENS]` pointers to activations of every token, in the order of `rotate` with `grouped`.
        part_step: Distance of the PARTS of activations.
        codes: Of the weight.

    Returns:
        `[16 * DOWN, TOKENS]` float32, `1024 + byte sum` for the weights; `weight_row` tells which row stands where.
        Those of tiles that do not exist hold any numbers.
    """
    STEP: tl.constexpr = ACROSS * 8 * BITS  # words of a row of tiles
    lane = tl.arange(0, 8 * ACROSS)[None, :]
    unit = lane // 4 % 8
    i = tile_row + tl.arange(0, DOWN)[:, None]
    if not EVEN:
        i = tl.minimum(i, tile_rows_total - 1)
    row_of_tiles = codes + i.to(tl.int64) * tile_columns * (8 * BITS)
    j = begin * ACROSS + lane // 32 * 4 + lane % 4
    before_unit = (unit * BITS + 8 * BITS - 1) % (8 * BITS)
    tile = row_of_tiles + j * (8 * BITS)
    x_place = x_token[None, :] + begin * (16 * ACROSS) + tl.arange(0, 16 * ACROSS)[:, None]
    total = tl.zeros([16 * DOWN, TOKENS], tl.float32)
    for step in range(begin, end):
        if not EVEN:  # columns that do not exist meet activations of zero
            j = tl.minimum(step * ACROSS + lane // 32 * 4 + lane % 4, tile_columns - 1)
            tile = row_of_tiles + j * (8 * BITS)
        words = unit_words(tile + unit * BITS, tile + before_unit, BITS)
        half = biased_byte_sums(windows(words, BITS), MULTIPLIER, EXPLICIT)
        half = tl.reshape(half, [DOWN, ACROSS // 4, 8, 4, 2, 4, 2, 2])  # tile row; 64 columns, u, j; h, m, f, e
        weight = tl.reshape(tl.permute(half, [0, 4, 2, 1, 5, 6, 3, 7]), [16 * DOWN, 16 * ACROSS])
        for part in tl.static_range(PARTS):
            total = tl.dot(weight, tl.load(x_place + part * part_step), total)
        x_place += 16 * ACROSS
        tile += STEP
    return total


@triton.jit
def weight_row(place):
    """Row of the weight that stands at a place of `multiplied`."""
    return place // 16 * 16 + place % 8 * 2 + place // 8 % 2


@triton.jit(do_not_specialize=["tokens"])
def _product(x, codes, y, counters, sums, units, scale, signs, out_scale, out, offset, inverse_deviation, tokens,
             columns, rows, out_features, tile_columns, share, pieces, BITS: tl.constexpr, MULTIPLIER: tl.constexpr,
             EXPLICIT: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, DOWN: tl.constexpr,
             ACROSS: tl.constexpr, EVEN: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
             PIECES: tl.constexpr):  # fmt: skip
    """x [PARTS, tokens, columns] float16, codes -> out [tokens, out_features]; a share is `share` steps.

    EVEN: rows and columns are whole steps. SHARED: there are several shares, whose sums go through y
    [shares, tokens, rows] float32, and counters [blocks of rows] int32 are zero.
    """
    ROWS: tl.constexpr = 16 * DOWN
    begin = tl.program_id(1) * share
    end = min(begin + share, (tile_columns + ACROSS - 1) // ACROSS)
    token = tl.arange(0, TOKENS)
    # Tokens that do not exist repeat the last one.
    x_token = x + tl.minimum(token, tokens - 1).to(tl.int64) * columns
    total = multiplied(x_token, tokens.to(tl.int64) * columns, codes, tl.program_id(0) * DOWN, begin, end, rows // 16,
                       tile_columns, BITS, MULTIPLIER, EXPLICIT, TOKENS, PARTS, DOWN, ACROSS, EVEN)  # fmt: skip

    token = token.to(tl.int64)
    if SHARED:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        permuted = weight_row(row)
        place = y + (tl.program_id(1).to(tl.int64) * tokens + token)[None, :] * rows + permuted[:, None]
        tl.store(place, total, mask=(permuted < rows)[:, None] & (token < tokens)[None, :])
        tl.debug_barrier()  # the whole program has written before one of its threads says so
        before = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel")
        if before == tl.num_programs(1) - 1:
            tl.debug_barrier()
            added = partial_sum(y, token, row, tl.num_programs(1), tokens, rows, TOKENS, ROWS)
            finished(added, token, row, sums, units, scale, signs, out_scale, out, offset, inverse_deviation, tokens,
                     rows, out_features, pieces, BLOCK, TOKENS, ROWS, PIECES)  # fmt: skip
    else:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        total = tl.permute(tl.reshape(total, [DOWN, 2, 8, TOKENS]), [3, 0, 2, 1])
        finished(tl.reshape(total, [TOKENS, ROWS]), token, row, sums, units, scale, signs, out_scale, out, offset,
                 inverse_deviation, tokens, rows, out_features, pieces, BLOCK, TOKENS, ROWS, PIECES)  # fmt: skip


@triton.jit
def _decode(codes, weight, columns, tile_rows_total, tile_columns, BITS: tl.constexpr, MULTIPLIER: tl.constexpr,
            EXPLICIT: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr):  # fmt: skip
    """codes -> weight [16 * tile_rows, columns] float16, byte sums less 510."""
    first = tl.program_id(1) * ACROSS
    half = tile_rows(codes, tl.program_id(0) * DOWN, tile_rows_total, first, tile_columns, tile_columns, BITS,
                     MULTIPLIER, EXPLICIT, DOWN, ACROSS)  # fmt: skip
    row = tl.program_id(0) * (16 * DOWN) + tl.arange(0, 16 * DOWN)[:, None]
    column = first * 16 + tl.arange(0, 16 * ACROSS)[None, :]
    mask = (row < tile_rows_total * 16) & (column < columns)
    tl.store(weight + row.to(tl.int64) * columns + column, half - 1534.0, mask=mask)


def products(
    x: Tensor,
    sums: Tensor,
    units: Tensor,
    codes: Tensor,
    counters: Tensor,
    scale: Tensor,
    signs: Tensor,
    out_scale: Tensor,
    out: Tensor,
    *,
    bits: int,
    multiplier: int,
    block: int,
    offset: float,
    inverse_deviation: float,
) -> None:
    """Outputs of a weight, from activations in the basis of its codes.

    Args:
        x: `[parts, tokens, columns]` float16 of `rotation.rotate` with `grouped`, at most `MAX_TOKENS` tokens.
        sums: `[tokens, pieces]` of `rotate`.
        units: `[tokens]` of `rotate`.
        codes: `[rows / 16, padded_in / 16, 8 * bits]` int32, contiguous.
        counters: `[blocks(rows)]` int32 zeros.
        scale: `[rows]` float16, stored.
        signs: `[rows]` int8.
        out_scale: `[out_features]` bfloat16, stored.
        out: `[tokens, out_features]`.
        bits: Bits per weight, 1 to 8.
        multiplier: Constant of the observable, below 2^31.
        block: Rows of the output rotation.
        offset: Mean of the byte sums.
        inverse_deviation: One over their deviation.
    """
    parts, tokens, columns = x.shape
    down, across = codes.shape[0], codes.shape[1]
    share = steps_each(across, len(counters), len(counters) * tokens, multiprocessors(x.device))
    shares, pieces = triton.cdiv(triton.cdiv(across, ACROSS), share), sums.shape[1]
    y = torch.empty(shares if shares > 1 else 0, tokens, 16 * down, dtype=torch.float32, device=x.device)
    target = rounded_by_device(out)
    with on_device(x):
        _product[(len(counters), shares)](
            x, codes, y, counters, sums, units, scale, signs, out_scale, target, offset + 1024, inverse_deviation,
            tokens, columns, 16 * down, out.shape[1], across, share, pieces, BITS=bits, MULTIPLIER=multiplier,
            EXPLICIT=explicit_byte_sums(), TOKENS=max(16, triton.next_power_of_2(tokens)), PARTS=parts, DOWN=DOWN,
            ACROSS=ACROSS, EVEN=down % DOWN == 0 and across % ACROSS == 0, SHARED=shares > 1, BLOCK=block,
            PIECES=triton.next_power_of_2(pieces), num_warps=8, num_stages=1,
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


def blocks(rows: int) -> int:
    """Programs side by side that `products` needs for so many rows of a weight, each with a counter."""
    return triton.cdiv(rows, 16 * DOWN)


def decoded(codes: Tensor, bits: int, multiplier: int) -> Tensor:
    """Byte sums less 510 of all weights, exact in float16.

    Args:
        codes: `[rows / 16, columns / 16, 8 * bits]` int32, contiguous.
        bits: Bits per weight, 1 to 8.
        multiplier: Constant of the observable, below 2^31.

    Returns:
        `[rows, columns]` float16.
    """
    down, across = codes.shape[0], codes.shape[1]
    weight = torch.empty(16 * down, 16 * across, dtype=torch.float16, device=codes.device)
    with on_device(codes):
        _decode[(triton.cdiv(down, DOWN), triton.cdiv(across, ACROSS))](
            codes, weight, 16 * across, down, across, BITS=bits, MULTIPLIER=multiplier,
            EXPLICIT=explicit_byte_sums(), DOWN=DOWN, ACROSS=ACROSS, num_warps=8, num_stages=1,
        )  # fmt: skip
    return weight


@functools.cache
def steps_each(across: int, programs: int, sums: int, processors: int) -> int:
    """Steps of a program: the fastest share of the columns by the model of `README.md`.

    The busiest multiprocessor decides: it runs a whole number of programs, each of some steps, and a start. Sums of
    shares go through the cache of the device, and the last program of every block of rows adds them.

    Args:
        across: Tiles of a row of the weight.
        programs: Programs of a share: blocks of rows, for every block of tokens.
        sums: Sums that a share writes, in blocks of rows: one for every token of every program.
        processors: Multiprocessors.
    """
    steps = triton.cdiv(across, ACROSS)
    extra = ADDED * max(1, sums / programs / 16) + MOVED * sums

    def cost(shares: int) -> float:
        each = triton.cdiv(steps, shares)
        busy = triton.cdiv(programs * triton.cdiv(steps, each), processors)
        return max(busy, RESIDENT) * (each + START) + (extra * shares if shares > 1 else 0)

    return triton.cdiv(steps, min(range(1, steps + 1), key=cost))
