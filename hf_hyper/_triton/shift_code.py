"""Device functions that read the codes of `shift`.

A tile's string of 256 k bits falls into 8 units of k words; a unit holds 32 weights, two rows of the tile, so that for
any k from 1 to 8 it begins at a word. One lane reads the k words of a unit and the one before it on the ring:

    words of a unit, k = 3       before | w0 | w1 | w2
    window of weight t           16 bits that end with bit 3 (t + 1) of w0 w1 w2: in two neighbouring words at most

Which words, and by how much to shift them, is known when the kernel is compiled. All of it is integer arithmetic, as
`hyperfunctions/shift.py` defines it.
"""

import triton
import triton.language as tl


@triton.jit
def _windows(words, FIRST: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    """Windows of the weights `FIRST`, `FIRST + STEP`, ... of a unit, joined pair by pair so that they stay in one lane.

    Returns one more dimension of 2 for every doubling of `STEP` up to 32, the last one running fastest.
    """
    if STEP == 32:
        begin: tl.constexpr = (FIRST + 1) * BITS + 16  # first bit of the window, from the start of the word before
        pair = words[begin // 32].to(tl.uint64) << 32
        if begin % 32 > 16:
            pair |= words[begin // 32 + 1].to(tl.uint64)
        return ((pair >> (48 - begin % 32)) & 0xFFFF).to(tl.uint32)
    else:
        return tl.join(_windows(words, FIRST, 2 * STEP, BITS), _windows(words, FIRST + STEP, 2 * STEP, BITS))


@triton.jit
def unit_windows(codes, ok, unit, BITS: tl.constexpr):
    """Windows of 32 consecutive weights.

    Args:
        codes: Block of pointers `[a, b]` to the first word of the tile of every unit.
        ok: Which of them may be read, as large.
        unit: Number of the unit in its tile, as large.

    Returns:
        `[a, b, 2, 2, 2, 2, 2]` uint32 in 0..65535, the last dimension running fastest.
    """
    before = (unit * BITS + 8 * BITS - 1) % (8 * BITS)
    words = (tl.load(codes + before, mask=ok, other=0).to(tl.uint32, bitcast=True),)
    for i in tl.static_range(BITS):
        words = words + (tl.load(codes + unit * BITS + i, mask=ok, other=0).to(tl.uint32, bitcast=True),)  # noqa: RUF005
    return _windows(words, 0, 1, BITS)


@triton.jit
def biased_byte_sums(windows, MULTIPLIER: tl.constexpr, EXPLICIT: tl.constexpr):
    """`1024 +` the sum of the four bytes of `window * MULTIPLIER mod 2^32`, exact in float16, for uint32 windows."""
    product = windows * MULTIPLIER
    if EXPLICIT:
        pairs = (product & 0x00FF00FF) + ((product >> 8) & 0x00FF00FF)
        half = ((pairs & 0xFFFF) + (pairs >> 16) + 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        half = tl.inline_asm_elementwise(
            """{
            .reg .b32 one, other;
            dp4a.u32.u32 one, $1, 0x01010101, 0x6400;
            dp4a.u32.u32 other, $2, 0x01010101, 0x6400;
            prmt.b32 $0, one, other, 0x5410;
            }""",
            "=r,r,r",
            [product],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return half


@triton.jit
def tile_rows(codes, tile_row, tile_rows_total, tile_column, tile_end, columns, BITS: tl.constexpr,
              MULTIPLIER: tl.constexpr, EXPLICIT: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr):  # fmt: skip
    """Byte sums plus 1024 of `DOWN` x `ACROSS` tiles as a matrix `[16 DOWN, 16 ACROSS]` float16.

    Tiles begin at (`tile_row`, `tile_column`); those from row `tile_rows_total` or column `tile_end` on hold any finite
    numbers. A row of tiles has `columns` tiles.
    """
    i = tile_row + tl.arange(0, DOWN)[:, None]
    lane = tl.arange(0, ACROSS * 8)[None, :]  # units of one row of tiles lie one after the other in memory
    j = tile_column + lane // 8
    ok = (i < tile_rows_total) & (j < tile_end)
    base = codes + (i.to(tl.int64) * columns + j) * (8 * BITS)
    windows = unit_windows(base, ok, lane % 8 + tl.zeros_like(i), BITS)
    half = biased_byte_sums(windows, MULTIPLIER, EXPLICIT)
    half = tl.reshape(half, [DOWN, ACROSS, 8, 2, 16])
    return tl.reshape(tl.permute(half, [0, 2, 3, 1, 4]), [16 * DOWN, 16 * ACROSS])
