"""The full Viterbi search of `shift`, L' = 16 of `csrc/shift_encode.cpp`, whose integers and ties it repeats.

One program takes one tile through all its weights. A step weighs all 2^16 states: state s = h · 2^(16-k) + c comes from
class s >> k and leads to class c, so with the costs of the classes as a matrix

    costs [h, c div 2^k] + branch [h, c div 2^k, c mod 2^k]     minimum over h ->     costs [c div 2^k, c mod 2^k]

is the whole recursion: a broadcast and a reduction. Heads h are taken one after the other, or from 5 bits on a 16th of
them, so that branches fit in registers. Costs are limited to 65535 after the minimum instead of before it, which is the
same number; where every head leads past that limit all of them tie, and the lowest is taken. The h of every class goes
to memory, and a second kernel, one lane a tile, walks back along them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_hyper._triton.library import interpreted, on_device

__all__ = ["full_search"]

TILE_WEIGHTS = 256
SCRATCH_BYTES = 1 << 30
"""Memory for the choices of the tiles that are searched together: 1 MiB a tile at 4 bits, 8 MiB at 1 bit."""

TRACED_TOGETHER = 32

NEVER: tl.constexpr = tl.constexpr(65535)
RESCALE_AT: tl.constexpr = tl.constexpr(4096)
MAX_DISTANCE: tl.constexpr = tl.constexpr(255)


@triton.jit
def _halved(parts, HEADS: tl.constexpr, HIGH: tl.constexpr):
    """Every block `[HEADS, HIGH]` as two of half the heads, in order."""
    halves = ()
    for i in tl.static_range(len(parts)):
        split = tl.permute(tl.reshape(parts[i], [2, HEADS // 2, HIGH]), [1, 2, 0])
        low, high = tl.split(split)
        halves = halves + (low, high)  # noqa: RUF005
    return halves


@triton.jit
def _cheapest(before, table, target, first, after, BITS: tl.constexpr, HEADS: tl.constexpr):
    """Over heads from `first` on: least cost to every class, `[HIGH, 2^BITS]`, times 256, plus the lowest head with it.

    `before` `[HEADS, HIGH]` holds the costs of the classes that the heads lead from, likewise.
    """
    head = first + tl.arange(0, HEADS)[:, None, None]
    entry = tl.load(table + head * (1 << (16 - BITS)) + after[None, :, :]).to(tl.int32)
    if BITS <= 4:
        # The distance, its sign turned such that only one end can lie outside -32768..32767.
        sign = tl.where(target < 0, 1, -1)
        distance = tl.minimum(entry * sign - target * sign, tl.where(target < 0, 32767, 32768))
        branch = (distance * distance + 16384) >> 15
    else:
        distance = tl.minimum(tl.abs(entry - target), MAX_DISTANCE)
        branch = distance * distance
    return tl.min((branch << 8) + before[:, :, None], 0)


@triton.jit(do_not_specialize=["first", "steps", "kept"])
def _advance(targets, table, seams, choices, first, steps, kept, BITS: tl.constexpr, CLOSED: tl.constexpr,
             PARTS: tl.constexpr):  # fmt: skip
    """Costs along `steps` weights from weight `first` on, and the choices of the last `kept`.

    targets [tiles, 256] int32, table [65536] int16, choices [tiles, kept, classes] uint8. With CLOSED the path starts
    in the class in seams [tiles] int32, else anywhere, and the cheapest last class is written there.
    """
    CLASSES: tl.constexpr = 1 << (16 - BITS)
    HEADS: tl.constexpr = 1 << BITS
    HIGH: tl.constexpr = CLASSES // HEADS
    tile = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    after = tl.arange(0, HIGH)[:, None] * HEADS + tl.arange(0, HEADS)[None, :]
    every = tl.arange(0, CLASSES)
    if CLOSED:
        costs = tl.where(every == tl.load(seams + tile), 0, NEVER)
    else:
        costs = tl.zeros([CLASSES], tl.int32)
    for t in range(steps):
        target = tl.load(targets + tile * 256 + ((first + t) & 255))
        parts = (((tl.reshape(costs, [HEADS, HIGH]) << 8) | head),)
        for halving in tl.static_range(4):
            if PARTS >> (halving + 1) > 0:
                parts = _halved(parts, HEADS >> halving, HIGH)
        best = _cheapest(parts[0], table, target, 0, after, BITS, HEADS // PARTS)
        for i in tl.static_range(1, PARTS):
            some = _cheapest(parts[i], table, target, i * (HEADS // PARTS), after, BITS, HEADS // PARTS)
            best = tl.minimum(best, some)
        if t >= steps - kept:
            place = choices + (tile * kept + (t - steps + kept)) * CLASSES + after
            tl.store(place, tl.where(best < (NEVER << 8), best & 255, 0).to(tl.uint8))
        costs = tl.minimum(tl.reshape(best >> 8, [CLASSES]), NEVER)
        lowest = tl.min(costs, 0)
        costs -= tl.where(lowest >= RESCALE_AT, lowest, 0)
    if not CLOSED:
        cheapest = tl.min((costs.to(tl.uint32) << 16) | every.to(tl.uint32), 0)
        tl.store(seams + tile, (cheapest & 0xFFFF).to(tl.int32))


@triton.jit(do_not_specialize=["tiles", "steps"])
def _trace(choices, seams, symbols, tiles, steps, BITS: tl.constexpr, CLOSED: tl.constexpr, TOGETHER: tl.constexpr):
    """Back from the last class to the first; with CLOSED to symbols [tiles, 256] uint8, else the first one to seams."""
    CLASSES: tl.constexpr = 1 << (16 - BITS)
    tile = (tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)).to(tl.int64)
    here = tile < tiles
    now = tl.load(seams + tile, mask=here, other=0)
    for back in range(steps):
        t = steps - 1 - back
        if CLOSED:
            tl.store(symbols + tile * 256 + t, (now & ((1 << BITS) - 1)).to(tl.uint8), mask=here)
        head = tl.load(choices + (tile * steps + t) * CLASSES + now, mask=here, other=0).to(tl.int32)
        now = (head * CLASSES + now) >> BITS
    if not CLOSED:
        tl.store(seams + tile, now, mask=here)


def full_search(table: Tensor, targets: Tensor, bits: int, seam_weights: int) -> Tensor:
    """Symbols of the cheapest ring through every tile, by the two passes of `csrc/shift_encode.cpp`.

    Args:
        table: `[65536]` int32, entry of every state, magnitudes below 2^15.
        targets: `[n, 256]` int32.
        bits: Bits per weight, 1 to 8.
        seam_weights: Weights on either side of the seam in the first pass.

    Returns:
        `[n, 256]` int64 in `[0, 2**bits)`.
    """
    classes = 1 << (16 - bits)
    parts = 2 if interpreted() else min(1 << bits, 16)  # the interpreter is as slow for small blocks as for large ones
    together = max(1, SCRATCH_BYTES // (TILE_WEIGHTS * classes))
    narrow = table.to(torch.int16)
    symbols = torch.empty(len(targets), TILE_WEIGHTS, dtype=torch.uint8, device=targets.device)
    most = min(together, len(targets))
    choices = torch.empty(most * TILE_WEIGHTS * classes, dtype=torch.uint8, device=targets.device)
    seams = torch.empty(most, dtype=torch.int32, device=targets.device)
    with on_device(targets):
        for begin in range(0, len(targets), together):
            part, found = targets[begin : begin + together], symbols[begin : begin + together]
            tiles, lanes = len(part), triton.cdiv(len(part), TRACED_TOGETHER)
            for closed, first, steps, kept in (
                (False, TILE_WEIGHTS - seam_weights, 2 * seam_weights, seam_weights),
                (True, 0, TILE_WEIGHTS, TILE_WEIGHTS),
            ):
                _advance[(tiles,)](
                    part, narrow, seams, choices, first, steps, kept, BITS=bits, CLOSED=closed,
                    PARTS=parts, num_warps=16, num_stages=1,
                )  # fmt: skip
                _trace[(lanes,)](
                    choices, seams, found, tiles, kept, BITS=bits, CLOSED=closed, TOGETHER=TRACED_TOGETHER,
                    num_warps=1, num_stages=1,
                )  # fmt: skip
    return symbols.long()
