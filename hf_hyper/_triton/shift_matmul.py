"""Products with `shift` weights in the basis of their codes, and their decoding for cuBLAS.

Weights enter as `1024 + byte sum`: above 1024 the last digit of float16 is worth one, so the sum of four bytes with the
bits of 1024 added is that number without a conversion. Tensor cores multiply it with float16 activations into float32;
subtracting `(1024 + mean) · (sum of activations)` and scaling the rows is left to `rotation.finish`. A program takes a
block of rows and a share of the columns, decodes each of its weights once, and multiplies it with all tokens at hand.
Shares of columns write sums of their own, which `rotation.finish` adds in a fixed order: nothing is atomic, so results
repeat bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_hyper._triton.library import explicit_byte_sums, multiprocessors, on_device
from hf_hyper._triton.shift_code import tile_rows

__all__ = ["MAX_TOKENS", "decoded", "partial_products"]

MAX_TOKENS = 128
"""Tokens that one decoding of the weight serves."""

DOWN, ACROSS = 4, 4
"""Tiles of a step of a program: 64 rows and 64 columns, one unit of 32 weights for each of 128 threads."""

WAVES = 8
"""Programs per multiprocessor for which columns are shared out: the arithmetic of some hides the loads of others, which
needs no copies through shared memory (`num_stages=1`: 6.2 instructions a weight at 4 bits instead of 8.2)."""

LEAST_STEPS = 4
"""Steps of a program at least, else writing partial sums costs more than it gains."""


@triton.jit(do_not_specialize=["tokens"])
def _product(x, codes, y, tokens, rows, columns, tile_rows_total, tile_columns, share, BITS: tl.constexpr,
             MULTIPLIER: tl.constexpr, EXPLICIT: tl.constexpr, TOKENS: tl.constexpr, DOWN: tl.constexpr,
             ACROSS: tl.constexpr):  # fmt: skip
    """x [tokens, columns] float16, codes -> y [shares, tokens, rows] float32; a share is `share` columns of tiles."""
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    begin = tl.program_id(1) * share
    end = min(begin + share, tile_columns)
    x_token = x + token.to(tl.int64)[None, :] * columns
    total = tl.zeros([16 * DOWN, TOKENS], tl.float32)
    for first in range(begin, end, ACROSS):
        weight = tile_rows(codes, tl.program_id(0) * DOWN, tile_rows_total, first, end, tile_columns, BITS, MULTIPLIER,
                           EXPLICIT, DOWN, ACROSS)  # fmt: skip
        column = first * 16 + tl.arange(0, 16 * ACROSS)[:, None]
        mask = (column < end * 16) & (token < tokens)[None, :]
        total = tl.dot(weight, tl.load(x_token + column, mask=mask, other=0.0), total)
    row = tl.program_id(0) * (16 * DOWN) + tl.arange(0, 16 * DOWN)
    place = (tl.program_id(1).to(tl.int64) * tokens + token)[None, :] * rows + row[:, None]
    tl.store(y + place, total, mask=(row < rows)[:, None] & (token < tokens)[None, :])


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


def partial_products(x: Tensor, codes: Tensor, bits: int, multiplier: int) -> Tensor:
    """`x @ (1024 + byte sums).T` by shares of the columns.

    Args:
        x: `[tokens, columns]` float16, contiguous.
        codes: `[rows / 16, columns / 16, 8 * bits]` int32, contiguous.
        bits: Bits per weight, 1 to 8.
        multiplier: Constant of the observable, below 2^31.

    Returns:
        `[shares, tokens, rows]` float32; the product is the sum over the first dimension.
    """
    tokens, columns = x.shape
    down, across = codes.shape[0], codes.shape[1]
    block = min(max(16, triton.next_power_of_2(tokens)), MAX_TOKENS)
    grid_rows, grid_tokens = triton.cdiv(down, DOWN), triton.cdiv(tokens, block)
    share = _share(across, tokens, bits, grid_rows * grid_tokens, multiprocessors(x.device))
    shares = triton.cdiv(across, share)
    y = torch.empty(shares, tokens, 16 * down, dtype=torch.float32, device=x.device)
    with on_device(x):
        _product[(grid_rows, shares, grid_tokens)](
            x, codes, y, tokens, 16 * down, columns, down, across, share, BITS=bits, MULTIPLIER=multiplier,
            EXPLICIT=explicit_byte_sums(), TOKENS=block, DOWN=DOWN, ACROSS=ACROSS, num_warps=4, num_stages=1,
        )  # fmt: skip
    return y


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
            EXPLICIT=explicit_byte_sums(), DOWN=DOWN, ACROSS=ACROSS, num_warps=4, num_stages=1,
        )  # fmt: skip
    return weight


def _share(across: int, tokens: int, bits: int, programs: int, processors: int) -> int:
    """Columns of tiles of a program: as many shares as fill the device, but partial sums of half the bytes of codes at
    most (8 bytes written and read against bits / 8 a column), and none shorter than `LEAST_STEPS` steps."""
    shares = max(1, min(WAVES * processors // programs, 16 * across * bits // (128 * tokens)))
    steps = triton.cdiv(across, ACROSS)
    return ACROSS * max(min(LEAST_STEPS, steps), triton.cdiv(steps, shares))
