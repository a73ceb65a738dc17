"""Products of rows of activations with the `winding` weights of their experts.

The kernel of `winding` with the table of `experts` in front: which block of rows belongs to which expert is known on
the device only, and nothing waits for it. Columns are not shared out; several experts fill the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_hyper._triton.experts import schedule
from hf_hyper._triton.library import on_device
from hf_hyper._triton.winding import CODES, MAX_TOKENS, ROWS, multiplied, precision

__all__ = ["products"]


@triton.jit(do_not_specialize=["experts", "first", "second"])
def _product(x, codes, centre, side, order, owner, first_place, last_place, y, experts, rows, columns, words, first,
             second, WIDTH: tl.constexpr, POINTS: tl.constexpr, SHELLS: tl.constexpr, TOKENS: tl.constexpr,
             ROWS: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x [tokens, columns], codes [experts, rows, words] -> y [tokens, rows] float32."""
    expert = tl.load(owner + tl.program_id(1)).to(tl.int64)
    if expert < experts:
        place = tl.load(first_place + tl.program_id(1)) + tl.arange(0, TOKENS)
        here = place < tl.load(last_place + tl.program_id(1))
        token = tl.load(order + place, mask=here, other=0).to(tl.int64)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        total = multiplied(x + token[None, :] * columns, here[None, :], codes + expert * rows * words,
                           centre + expert * 2, side + expert * (SHELLS + 1), row, rows, columns, words, 0, columns,
                           first, second, WIDTH, POINTS, SHELLS, TOKENS, ROWS, CODES, PRECISION)  # fmt: skip
        tl.store(y + token[None, :] * rows + row[:, None], total, mask=(row < rows)[:, None] & here[None, :])


def products(
    x: Tensor,
    ids: Tensor,
    codes: Tensor,
    centre: Tensor,
    side: Tensor,
    *,
    width: int,
    num_points: int,
    num_shells: int,
    direction: tuple[int, int],
) -> Tensor:
    """Every row times its expert's weight, `[tokens, rows]` float32; zeros for numbers that are no expert's.

    Args:
        x: `[tokens, columns]` float32, bfloat16 or float16, contiguous.
        ids: `[tokens]` int32 or int64, the expert of every row.
        codes: `[experts, rows, words]` int32, contiguous.
        centre: `[experts, 2]` float32, contiguous.
        side: `[experts, num_shells + 1]` float32, contiguous.
        width: Bits of a code, up to 24.
        num_points: Orbit points of a shell.
        num_shells: Shells beside the box.
        direction: Of the winding, in 2^-32 of a turn.
    """
    (tokens, columns), (experts, rows, words) = x.shape, codes.shape
    block = min(max(16, triton.next_power_of_2(triton.cdiv(tokens, experts))), MAX_TOKENS)
    order, owner, first, last = schedule(ids, experts, block)
    y = torch.zeros(tokens, rows, dtype=torch.float32, device=x.device)
    with on_device(x):
        _product[(triton.cdiv(rows, ROWS), len(owner))](
            x, codes, centre, side, order, owner, first, last, y, experts, rows, columns, words, *direction,
            WIDTH=width, POINTS=num_points, SHELLS=num_shells, TOKENS=block, ROWS=ROWS, CODES=CODES,
            PRECISION=precision(x.dtype), num_warps=4, num_stages=1,
        )  # fmt: skip
    return y
