"""Products with `winding` weights straight from their codes, and their decoding, two weights to a code.

A row of the weight is a string of codes of WIDTH bits; a lane reads the two words in which its code lies and computes
the orbit point with the integers of `hyperfunctions/winding.py`. First and second weights of the codes stay two
matrices, each multiplied with every other activation, in tf32 for 16-bit activations and in three products of it for
float32. Shares of the columns write sums of their own, added afterwards in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_hyper._triton.library import interpreted, multiprocessors, on_device

__all__ = ["CODES", "MAX_TOKENS", "ROWS", "decoded", "multiplied", "precision", "products"]

MAX_TOKENS = 64
"""Tokens that one decoding of the weight serves."""

ROWS, CODES = 64, 32
"""Rows and codes of a step of a program."""

WAVES, LEAST_STEPS = 8, 4
"""Programs per multiprocessor for which columns are shared out, and steps of a program at least."""


@triton.jit
def _point(codes, row, code, ok, words, WIDTH: tl.constexpr, POINTS: tl.constexpr, SHELLS: tl.constexpr):
    """Shell of codes, int32, and their orbit time plus one (0: the centre), uint32."""
    bit = code * WIDTH
    place = codes + row.to(tl.int64) * words + bit // 32
    high = tl.load(place, mask=ok, other=0).to(tl.uint32, bitcast=True).to(tl.uint64) << 32
    crosses = ok & (bit % 32 + WIDTH > 32)
    low = tl.load(place + 1, mask=crosses, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    shift = (64 - WIDTH - bit % 32).to(tl.uint64)
    number = ((high | low) >> shift).to(tl.int32) & ((1 << WIDTH) - 1)
    return tl.minimum(number // (POINTS + 1), SHELLS), (number % (POINTS + 1)).to(tl.uint32)


@triton.jit
def _coordinate(node, centre, side, direction):
    """Weight of orbit time node - 1 in one direction."""
    angle = (node - 1) * direction.to(tl.uint32)
    turned = (angle ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.float32) * (1.0 / 4294967296.0)
    return centre + side * tl.where(node == 0, 0.0, turned)


@triton.jit
def _weights(codes, centre, side, row, code, ok, words, first, second, WIDTH: tl.constexpr, POINTS: tl.constexpr,
             SHELLS: tl.constexpr):  # fmt: skip
    """First and second weight of codes, float32."""
    shell, node = _point(codes, row, code, ok, words, WIDTH, POINTS, SHELLS)
    length = tl.load(side + shell)
    return _coordinate(node, tl.load(centre), length, first), _coordinate(node, tl.load(centre + 1), length, second)


@triton.jit
def multiplied(x_token, here, codes, centre, side, row, rows, columns, words, begin, end, first, second,
               WIDTH: tl.constexpr, POINTS: tl.constexpr, SHELLS: tl.constexpr, TOKENS: tl.constexpr,
               ROWS: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Products of rows of a weight with tokens, over the codes from `begin` to `end`: `[ROWS, TOKENS]` float32.

    Args:
        x_token: `[1, TOKENS]` pointers to the activations of every token.
        here: `[1, TOKENS]`, which tokens exist.
        row: `[ROWS]`.
    """
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(begin, min(end, (columns + 1) // 2), CODES):
        code = start + tl.arange(0, CODES)
        ok = (row < rows)[:, None] & (code * 2 < columns)[None, :]
        one, other = _weights(codes, centre, side, row[:, None], code[None, :], ok, words, first, second, WIDTH, POINTS,
                              SHELLS)  # fmt: skip
        column = (code * 2)[:, None]
        even = tl.load(x_token + column, mask=here & (column < columns), other=0.0).to(tl.float32)
        odd = tl.load(x_token + column + 1, mask=here & (column + 1 < columns), other=0.0).to(tl.float32)
        total = tl.dot(one, even, total, input_precision=PRECISION)
        total = tl.dot(other, odd, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["tokens", "first", "second"])
def _product(x, codes, centre, side, y, tokens, rows, columns, words, share, first, second, WIDTH: tl.constexpr,
             POINTS: tl.constexpr, SHELLS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
             CODES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x [tokens, columns], codes [rows, words] -> y [shares, tokens, rows] float32; a share is `share` codes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    here = (token < tokens)[None, :]
    begin = tl.program_id(1) * share
    total = multiplied(x + token.to(tl.int64)[None, :] * columns, here, codes, centre, side, row, rows, columns, words,
                       begin, begin + share, first, second, WIDTH, POINTS, SHELLS, TOKENS, ROWS, CODES,
                       PRECISION)  # fmt: skip
    place = y + (tl.program_id(1) * tokens + token).to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(place, total, mask=(row < rows)[:, None] & here)


@triton.jit(do_not_specialize=["first", "second"])
def _decode(codes, centre, side, weight, rows, columns, words, first, second, WIDTH: tl.constexpr,
            POINTS: tl.constexpr, SHELLS: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr):  # fmt: skip
    """codes [rows, words] -> weight [rows, columns]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    code = tl.program_id(1) * CODES + tl.arange(0, CODES)[None, :]
    ok = (row < rows) & (code * 2 < columns)
    one, other = _weights(codes, centre, side, row, code, ok, words, first, second, WIDTH, POINTS, SHELLS)
    place = weight + row.to(tl.int64) * columns + code * 2
    tl.store(place, one.to(weight.dtype.element_ty), mask=ok)
    tl.store(place + 1, other.to(weight.dtype.element_ty), mask=ok & (code * 2 + 1 < columns))


def products(
    x: Tensor,
    codes: Tensor,
    centre: Tensor,
    side: Tensor,
    *,
    width: int,
    num_points: int,
    num_shells: int,
    direction: tuple[int, int],
) -> Tensor:
    """`x @ weight.T`, `[tokens, rows]` float32.

    Args:
        x: `[tokens, columns]` float32, bfloat16 or float16, contiguous.
        codes: `[rows, words]` int32, contiguous.
        centre: `[2]` float32.
        side: `[num_shells + 1]` float32.
        width: Bits of a code, up to 24.
        num_points: Orbit points of a shell.
        num_shells: Shells beside the box.
        direction: Of the winding, in 2^-32 of a turn.
    """
    (tokens, columns), (rows, words) = x.shape, codes.shape
    block = min(max(16, triton.next_power_of_2(tokens)), MAX_TOKENS)
    down, across = triton.cdiv(rows, ROWS), triton.cdiv(tokens, block)
    steps = triton.cdiv(columns, 2 * CODES)
    shares = max(1, WAVES * multiprocessors(x.device) // (down * across))
    share = CODES * max(min(LEAST_STEPS, steps), triton.cdiv(steps, shares))
    shares = triton.cdiv(steps * CODES, share)
    y = torch.empty(shares, tokens, rows, dtype=torch.float32, device=x.device)
    with on_device(x):
        _product[(down, shares, across)](
            x, codes, centre, side, y, tokens, rows, columns, words, share, *direction, WIDTH=width,
            POINTS=num_points, SHELLS=num_shells, TOKENS=block, ROWS=ROWS, CODES=CODES,
            PRECISION=precision(x.dtype), num_warps=4, num_stages=1,
        )  # fmt: skip
    return y.sum(0)


def decoded(
    codes: Tensor,
    centre: Tensor,
    side: Tensor,
    weight: Tensor,
    *,
    width: int,
    num_points: int,
    num_shells: int,
    direction: tuple[int, int],
) -> None:
    """Write the weight of some rows to `weight`, `[rows, columns]` float32 or bfloat16; the rest as for `products`."""
    (rows, words), columns = codes.shape, weight.shape[1]
    with on_device(codes):
        _decode[(triton.cdiv(rows, ROWS), triton.cdiv(columns, 2 * CODES))](
            codes, centre, side, weight, rows, columns, words, *direction, WIDTH=width, POINTS=num_points,
            SHELLS=num_shells, ROWS=ROWS, CODES=CODES, num_warps=4, num_stages=1,
        )  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """Of products with activations of a dtype."""
    if interpreted() or torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"
