"""Products of rows of activations with the `shift` weights of their experts, in the basis of the codes.

The kernel of `shift_matmul` with a table in front. Rows are sorted by expert on the device; the sorted list is cut into
blocks of rows of one expert, and the table says of every block whose it is and where it begins and ends. How many
blocks there are depends on the routing and is known on the device only, so the grid has as many as there can be at
most, and those left over end at once: nothing waits, and the launch can be captured into a CUDA graph. Weights of
experts without rows are not read.

    rows    0 1 2 3 4 5 6     expert of each   2 0 2 2 9 0 2     blocks of 2
    order   1 5 | 0 2 | 3 6 | 4               expert of block   0 2 2 and one without
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_hyper._triton.library import explicit_byte_sums, multiprocessors, on_device
from hf_hyper._triton.shift_matmul import ACROSS, DOWN, MAX_TOKENS, multiplied, steps_each, weight_row

__all__ = ["products", "schedule"]


@triton.jit(do_not_specialize=["tokens", "experts"])
def _product(x, sums, codes, scale, order, owner, first_place, last_place, y, offset, inverse_deviation, tokens,
             experts, rows, columns, tile_columns, share, pieces, BITS: tl.constexpr, MULTIPLIER: tl.constexpr,
             EXPLICIT: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, DOWN: tl.constexpr,
             ACROSS: tl.constexpr, EVEN: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """x [PARTS, tokens, columns] float16, codes of all experts -> y [shares, tokens, rows] float32, scaled by `scale`.

    EVEN: rows and columns are whole steps.
    """
    expert = tl.load(owner + tl.program_id(2)).to(tl.int64)
    if expert < experts:
        place = tl.load(first_place + tl.program_id(2)) + tl.arange(0, TOKENS)
        here = place < tl.load(last_place + tl.program_id(2))
        token = tl.load(order + place, mask=here, other=0).to(tl.int64)
        begin = tl.program_id(1) * share
        end = min(begin + share, (tile_columns + ACROSS - 1) // ACROSS)
        own = codes + expert * (rows // 16) * tile_columns * (8 * BITS)
        total = multiplied(x + token * columns, tokens.to(tl.int64) * columns, own, tl.program_id(0) * DOWN, begin, end,
                           rows // 16, tile_columns, BITS, MULTIPLIER, EXPLICIT, TOKENS, PARTS, DOWN, ACROSS,
                           EVEN)  # fmt: skip
        number = tl.arange(0, PIECES)[:, None]
        some = tl.load(sums + token[None, :] * pieces + number, mask=(number < pieces) & here[None, :], other=0.0)
        bias = tl.where(tl.program_id(1) == 0, offset * tl.sum(some, 0), 0.0)  # the first share takes out that of all
        row = weight_row(tl.program_id(0) * (16 * DOWN) + tl.arange(0, 16 * DOWN))
        factor = tl.load(scale + expert * rows + row, mask=row < rows, other=0.0).to(tl.float32) * inverse_deviation
        total = (total - bias[None, :]) * factor[:, None]
        target = y + (tl.program_id(1).to(tl.int64) * tokens + token)[None, :] * rows + row[:, None]
        tl.store(target, total, mask=(row < rows)[:, None] & here[None, :])


def products(
    x: Tensor,
    sums: Tensor,
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    bits: int,
    multiplier: int,
    *,
    offset: float,
    inverse_deviation: float,
) -> Tensor:
    """Every row times its expert's weight before the output rotation, by shares of the columns.

    Args:
        x: `[parts, tokens, columns]` float16 of `rotation.rotate` with `grouped`.
        sums: `[tokens, pieces]` of `rotate`.
        ids: `[tokens]` int32 or int64; rows of numbers outside `[0, experts)` are left unwritten.
        codes: `[experts, rows / 16, padded_in / 16, 8 * bits]` int32, contiguous.
        scale: `[experts, rows]` float16, contiguous.
        bits: Bits per weight, 1 to 8.
        multiplier: Constant of the observable, below 2^31.
        offset: Mean of the byte sums.
        inverse_deviation: One over their deviation.

    Returns:
        `[shares, tokens, rows]` float32; the product is the sum over the first dimension.
    """
    parts, tokens, columns = x.shape
    experts, down, across = codes.shape[:3]
    block = min(max(16, triton.next_power_of_2(triton.cdiv(tokens, experts))), MAX_TOKENS)
    order, owner, first, last = schedule(ids, experts, block)
    grid_rows, pieces = triton.cdiv(down, DOWN), sums.shape[1]
    share = steps_each(across, grid_rows * len(owner), grid_rows * tokens, multiprocessors(x.device))
    shares = triton.cdiv(triton.cdiv(across, ACROSS), share)
    y = torch.empty(shares, tokens, 16 * down, dtype=torch.float32, device=x.device)
    with on_device(x):
        _product[(grid_rows, shares, len(owner))](
            x, sums, codes, scale, order, owner, first, last, y, offset + 1024, inverse_deviation, tokens, experts,
            16 * down, columns, across, share, pieces, BITS=bits, MULTIPLIER=multiplier,
            EXPLICIT=explicit_byte_sums(), TOKENS=block, PARTS=parts, DOWN=DOWN, ACROSS=ACROSS,
            EVEN=down % DOWN == 0 and across % ACROSS == 0, PIECES=triton.next_power_of_2(pieces), num_warps=8,
            num_stages=1,
        )  # fmt: skip
    return y


def schedule(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows in the order of their experts, and of every block its expert (`experts` for none), first and last place.

    Args:
        ids: `[tokens]` int32 or int64, at least one.
        experts: Number of experts.
        block: Rows of a block.

    Returns:
        `[tokens]` and three times `[blocks]` int32, as many blocks as there can be.
    """
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts)
    order = ids.argsort(stable=True)
    starts = torch.searchsorted(ids[order], torch.arange(experts + 1, dtype=ids.dtype, device=ids.device))
    blocks = (starts.diff() + block - 1) // block
    ends = blocks.cumsum(0)
    most = min(len(ids), min(experts, len(ids)) + len(ids) // block)
    number = torch.arange(most, device=ids.device)
    owner = torch.searchsorted(ends, number, right=True)
    own = owner.clamp(max=experts - 1)
    first = starts[own] + (number - ends[own] + blocks[own]) * block
    return order.int(), owner.int(), first.int(), starts[own + 1].int()
