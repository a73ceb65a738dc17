"""Device functions that read the codes of `shift`.

A tile's string of 256 k bits falls into 8 units of k words; a unit holds 32 weights, two rows of the tile, so that for
any k from 1 to 8 it begins at a word. One lane reads the k words of a unit and the one before it on the ring:

    words of a unit, k = 3       before | w0 | w1 | w2
    window of weight t           16 bits that end with bit 3 (t + 1) of w0 w1 w2: in two neighbouring words at most

Which words, and by how much to shift them, is known when the kernel is compiled. All of it is integer arithmetic, as
`hyperfunctions/shift.py` defines it. Nothing here calls itself: Triton before 3.5 cannot hash such functions.
"""

import triton
import triton.language as tl


@triton.jit
def unit_words(own, before, BITS: tl.constexpr):
    """Words of units: the one before, then `BITS` of their own, a tuple of blocks `[a, b]` uint32.

    Args:
        own: Block of pointers `[a, b]` to the first word of every unit.
        before: As large, to the last word of the unit before it on the ring.
    """
    words = (tl.load(before).to(tl.uint32, bitcast=True),)
    if BITS % 4 == 0:  # a unit begins at a multiple of 16 bytes: whole vectors
        for i in tl.static_range(BITS // 4):
            four = tl.load(own[:, :, None] + (4 * i + tl.arange(0, 4)[None, None, :])).to(tl.uint32, bitcast=True)
            even, odd = tl.split(tl.reshape(four, [four.shape[0], four.shape[1], 2, 2]))
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            words = words + (first, second, third, fourth)  # noqa: RUF005
    elif BITS % 2 == 0:
        for i in tl.static_range(BITS // 2):
            two = tl.load(own[:, :, None] + (2 * i + tl.arange(0, 2)[None, None, :])).to(tl.uint32, bitcast=True)
            first, second = tl.split(two)
            words = words + (first, second)  # noqa: RUF005
    else:
        for i in tl.static_range(BITS):
            words = words + (tl.load(own + i).to(tl.uint32, bitcast=True),)  # noqa: RUF005
    return words


@triton.jit
def _window(words, T: tl.constexpr, BITS: tl.constexpr):
    begin: tl.constexpr = (T + 1) * BITS + 16  # first bit of the window, from the start of the word before
    if begin % 32 <= 16:
        window = (words[begin // 32] >> (16 - begin % 32)) & 0xFFFF
    else:
        pair = (words[begin // 32].to(tl.uint64) << 32) | words[begin // 32 + 1].to(tl.uint64)
        window = ((pair >> (48 - begin % 32)) & 0xFFFF).to(tl.uint32)
    return window


@triton.jit
def _joined(blocks, HALF: tl.constexpr):
    """Blocks i and i + HALF along a new last dimension."""
    pairs = ()
    for i in tl.static_range(HALF):
        pairs = pairs + (tl.join(blocks[i], blocks[i + HALF]),)  # noqa: RUF005
    return pairs


@triton.jit
def windows(words, BITS: tl.constexpr):
    """Windows of the 32 weights of units, from `unit_words`: `[a, b, 2, 2, 2, 2, 2]` uint32 in 0..65535.

    The last dimension runs fastest. All weights of a unit stay in one lane.
    """
    found = ()
    for t in tl.static_range(32):
        found = found + (_window(words, t, BITS),)  # noqa: RUF005
    return _joined(_joined(_joined(_joined(_joined(found, 16), 8), 4), 2), 1)[0]


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
    lane = tl.arange(0, ACROSS * 8)[None, :]  # units of one row of tiles lie one after the other in memory
    i = tl.minimum(tile_row + tl.arange(0, DOWN)[:, None], tile_rows_total - 1)
    j = tl.minimum(tile_column + lane // 8, tile_end - 1)
    tile = codes + (i.to(tl.int64) * columns + j) * (8 * BITS)
    unit = lane % 8
    words = unit_words(tile + unit * BITS, tile + (unit * BITS + 8 * BITS - 1) % (8 * BITS), BITS)
    half = tl.reshape(biased_byte_sums(windows(words, BITS), MULTIPLIER, EXPLICIT), [DOWN, ACROSS, 8, 2, 16])
    return tl.reshape(tl.permute(half, [0, 2, 3, 1, 4]), [16 * DOWN, 16 * ACROSS])
