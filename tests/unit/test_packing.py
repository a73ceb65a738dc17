import pytest
import torch

from hf_hyper.errors import ShapeError
from hf_hyper.packing import pack, unpack, words_per_row


@pytest.mark.parametrize("width", range(1, 33))
@pytest.mark.parametrize("count", [1, 7, 32, 33])
def test_unpack_inverts_pack(width: int, count: int) -> None:
    codes = torch.randint(0, 1 << width, (3, count))
    words = pack(codes, width)
    assert words.dtype == torch.int32
    assert words.shape == (3, words_per_row(count, width))
    assert torch.equal(unpack(words, width, count), codes)


def test_first_code_fills_the_highest_bits() -> None:
    words = pack(torch.tensor([0b10110, 0b00001, 0b11111, 0, 0, 0, 0b10000]), width=5)
    wanted = [0b10110_00001_11111_00000_00000_00000_10, 0b000 << 29]
    assert [word & 0xFFFFFFFF for word in words.tolist()] == wanted


@pytest.mark.parametrize("codes", [[8], [-1]])
def test_code_that_does_not_fit_is_refused(codes: list[int]) -> None:
    with pytest.raises(ShapeError, match=r"wanted \[0, 7\] for 3 bits"):
        pack(torch.tensor(codes), width=3)


def test_wrong_number_of_words_is_refused() -> None:
    with pytest.raises(ShapeError, match="rows of 2 words, wanted 1 for 3 codes of 8 bits"):
        unpack(torch.zeros(2, dtype=torch.int32), width=8, count=3)
