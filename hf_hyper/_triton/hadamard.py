"""The Walsh-Hadamard transform inside a kernel, on blocks that lie in registers."""

import triton
import triton.language as tl


@triton.jit
def hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Transform of the last dimension of `x` `[ROWS, WIDTH]`, a power of two, not normalised; Sylvester order.

    Every step adds and subtracts the pairs of one bit of the index and moves that bit to the front, so the next step
    finds its pairs side by side: mostly in one lane, which is why the compiler needs few exchanges between lanes.
    """
    tl.static_assert(WIDTH <= 1 << 15)
    for bit in tl.static_range(15):
        if WIDTH >> (bit + 1) > 0:
            even, odd = tl.split(tl.reshape(x, [ROWS, WIDTH // 2, 2]))
            x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), [0, 2, 1]), [ROWS, WIDTH])
    return x
