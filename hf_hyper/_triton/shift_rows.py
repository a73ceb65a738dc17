"""Rows of a `shift` weight before its input rotation: single ones, as embeddings look them up, or blocks of them.

A row is a sum, with signs, of the rows of its block of the output rotation: a program decodes the block's codes over
some columns and adds them up for one row. Which rows are asked for stays on the device. A row costs the decoding of up
to 128, a hundred times less than a layer's weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_hyper._triton.hadamard import hadamard
from hf_hyper._triton.library import explicit_byte_sums, on_device
from hf_hyper._triton.shift_code import tile_rows

__all__ = ["blocks", "rows"]

ACROSS = 8
"""Tiles of a program along the row."""

BLOCKS_ACROSS = 4
"""The same for whole blocks: 32 weights for each of 256 threads where blocks have 128 rows."""


@triton.jit
def _rows(index, codes, scale, signs, out, offset, inverse_deviation, out_features, columns, tile_rows_total,
          BITS: tl.constexpr, MULTIPLIER: tl.constexpr, EXPLICIT: tl.constexpr, BLOCK: tl.constexpr,
          ACROSS: tl.constexpr):  # fmt: skip
    """index [n] -> out [n, 16 * columns] float32: rows of C, turned back on the output side."""
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(index + number).to(tl.int64)
    exists = (row >= 0) & (row < out_features)
    row = tl.where(exists, row, 0)
    member = tl.arange(0, BLOCK)
    odd = (row % BLOCK).to(tl.int32) & member  # whether bits are common in odd number: the sign in the Hadamard matrix
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    first = row // BLOCK * BLOCK
    share = tl.where(odd & 1 == 1, -1.0, 1.0) * tl.load(scale + first + member).to(tl.float32)
    share *= inverse_deviation * BLOCK**-0.5
    share *= tl.load(signs + row).to(tl.float32)
    begin = tl.program_id(1) * ACROSS
    half = tile_rows(codes, (first // 16).to(tl.int32), tile_rows_total, begin, columns, columns, BITS, MULTIPLIER,
                     EXPLICIT, BLOCK // 16, ACROSS)  # fmt: skip
    total = tl.sum(((half - 1534.0).to(tl.float32) - offset) * share[:, None], 0)  # the first difference is exact
    column = begin * 16 + tl.arange(0, 16 * ACROSS)
    total = tl.where(exists, total, float("nan"))
    tl.store(out + number * columns * 16 + column, total, mask=column < columns * 16)


@triton.jit
def _blocks(codes, scale, signs, out, offset, inverse_deviation, columns, tile_rows_total, BITS: tl.constexpr,
            MULTIPLIER: tl.constexpr, EXPLICIT: tl.constexpr, BLOCK: tl.constexpr, ACROSS: tl.constexpr):  # fmt: skip
    """codes -> out [16 * tile_rows_total, 16 * columns] float32, turned back on the output side."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.program_id(1) * ACROSS
    half = tile_rows(codes, tl.program_id(0) * (BLOCK // 16), tile_rows_total, begin, columns, columns, BITS,
                     MULTIPLIER, EXPLICIT, BLOCK // 16, ACROSS)  # fmt: skip
    factor = tl.load(scale + row).to(tl.float32) * (inverse_deviation * BLOCK**-0.5)
    value = ((half - 1534.0).to(tl.float32) - offset) * factor[:, None]  # the first difference is exact
    value = hadamard(tl.trans(value), 16 * ACROSS, BLOCK) * tl.load(signs + row).to(tl.float32)[None, :]
    column = begin * 16 + tl.arange(0, 16 * ACROSS)
    place = out + row.to(tl.int64)[:, None] * (columns * 16) + column[None, :]
    tl.store(place, tl.trans(value), mask=(column < columns * 16)[None, :])


def blocks(
    codes: Tensor,
    scale: Tensor,
    signs: Tensor,
    *,
    bits: int,
    multiplier: int,
    block: int,
    offset: float,
    inverse_deviation: float,
) -> Tensor:
    """Whole blocks of rows of the weight before its input rotation, less `out_scale`: `[rows, padded_in]` float32.

    Args:
        codes: `[rows / 16, padded_in / 16, 8 * bits]` int32, contiguous.
        scale: `[rows]` float16, stored.
        signs: `[rows]` int8.
        bits: As for `rows`.
        multiplier: As for `rows`.
        block: Rows of the output rotation, a power of two from 16 to 128.
        offset: As for `rows`.
        inverse_deviation: As for `rows`.
    """
    down, across = codes.shape[0], codes.shape[1]
    out = torch.empty(16 * down, 16 * across, dtype=torch.float32, device=codes.device)
    with on_device(codes):
        _blocks[(16 * down // block, triton.cdiv(across, BLOCKS_ACROSS))](
            codes, scale, signs, out, offset - 510, inverse_deviation, across, down, BITS=bits, MULTIPLIER=multiplier,
            EXPLICIT=explicit_byte_sums(), BLOCK=block, ACROSS=BLOCKS_ACROSS, num_warps=8, num_stages=1,
        )  # fmt: skip
    return out


def rows(
    index: Tensor,
    codes: Tensor,
    scale: Tensor,
    signs: Tensor,
    *,
    bits: int,
    multiplier: int,
    block: int,
    out_features: int,
    offset: float,
    inverse_deviation: float,
) -> Tensor:
    """Rows of the weight before its input rotation, less `out_scale`: `[n, padded_in]` float32.

    Args:
        index: `[n]` int32 or int64. Numbers of rows that do not exist give rows of NaN.
        codes: `[padded_out / 16, padded_in / 16, 8 * bits]` int32, contiguous.
        scale: `[padded_out]` float16, stored.
        signs: `[padded_out]` int8.
        bits: Bits per weight, 1 to 8.
        multiplier: Constant of the observable, below 2^31.
        block: Rows of the output rotation, a power of two from 16 to 128.
        out_features: Rows of the weight.
        offset: Mean of the byte sums.
        inverse_deviation: One over their deviation.
    """
    down, across = codes.shape[0], codes.shape[1]
    out = torch.empty(len(index), 16 * across, dtype=torch.float32, device=codes.device)
    if len(index):
        with on_device(codes):
            _rows[(len(index), triton.cdiv(across, ACROSS))](
                index, codes, scale, signs, out, offset - 510, inverse_deviation, out_features, across, down,
                BITS=bits, MULTIPLIER=multiplier, EXPLICIT=explicit_byte_sums(), BLOCK=block, ACROSS=ACROSS,
                num_warps=4, num_stages=1,
            )  # fmt: skip
    return out
