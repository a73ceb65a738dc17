"""Codes of any width to 32-bit words and back, no arithmetic.

Each row is one bit string, most significant bit first, padded with zeros to whole words:

    codes (width 5)    aaaaa bbbbb ccccc ddddd eeeee fffff gg|ggg hhhhh ...
    words               word 0: bit 31 ............... bit 0 | word 1: bit 31 ...

Words are int32 because safetensors and every torch backend have it; their bits are those of the unsigned number.
"""

import torch
from torch import Tensor

from hf_hyper.errors import ShapeError

__all__ = ["pack", "unpack", "words_per_row"]

WORD = 32
_MASK = (1 << WORD) - 1


def words_per_row(count: int, width: int) -> int:
    """Words that `count` codes of `width` bits fill."""
    return -(-count * width // WORD)


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack every row of codes into 32-bit words.

    Args:
        codes: `[..., n]` integers in `[0, 2**width)`.
        width: Bits per code, 1 to 32.

    Returns:
        `[..., words_per_row(n, width)]` int32.

    Raises:
        ShapeError: A code does not fit `width`, or `width` is out of range.

    Example:
        >>> [hex(word) for word in pack(torch.tensor([0x7, 0x1]), width=4).tolist()]
        ['0x71000000']
    """
    _check_width(width)
    codes = codes.long()
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << width):
        raise ShapeError(
            f"codes range over [{int(codes.min())}, {int(codes.max())}], wanted [0, {(1 << width) - 1}] for "
            f"{width} bits; choose a larger width"
        )
    start = torch.arange(codes.shape[-1], device=codes.device) * width
    index, offset = start // WORD, start % WORD
    pair = codes << (64 - width - offset)  # the code's bits within its word and the next
    words = codes.new_zeros(*codes.shape[:-1], words_per_row(codes.shape[-1], width) + 1)
    words.index_add_(-1, index, pair >> WORD & _MASK).index_add_(-1, index + 1, pair & _MASK)
    return (words[..., :-1] - (words[..., :-1] >> 31 << 32)).to(torch.int32)


def unpack(words: Tensor, width: int, count: int) -> Tensor:
    """Codes of every row: the inverse of `pack`.

    Args:
        words: `[..., words_per_row(count, width)]` int32.
        width: Bits per code, 1 to 32.
        count: Codes per row.

    Returns:
        `[..., count]` int64 in `[0, 2**width)`.

    Raises:
        ShapeError: The rows have another length than `count` codes fill.
    """
    _check_width(width)
    if words.shape[-1] != words_per_row(count, width):
        raise ShapeError(
            f"rows of {words.shape[-1]} words, wanted {words_per_row(count, width)} for {count} codes of {width} bits"
        )
    start = torch.arange(count, device=words.device) * width
    index, offset = start // WORD, start % WORD
    unsigned = words.long() & _MASK
    following = torch.nn.functional.pad(unsigned[..., 1:], (0, 1))
    pair = unsigned[..., index] << 32 | following[..., index]  # 64 bits from the word in which the code starts
    return pair >> (64 - width - offset) & ((1 << width) - 1)


def _check_width(width: int) -> None:
    if not 1 <= width <= WORD:
        raise ShapeError(f"code width {width}, wanted 1 to {WORD} bits")
