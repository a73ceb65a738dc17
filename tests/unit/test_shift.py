import pytest
import torch

from hf_hyper import hyperfunctions
from hf_hyper.errors import ConfigError
from hf_hyper.hyperfunctions.shift import MULTIPLIER, Shift, byte_sums, states, values
from hf_hyper.scheme import TensorScheme


def windows_by_hand(words: list[int], bits: int) -> list[int]:
    """States of a tile read from its bit string as text: the format, word for word."""
    string = "".join(f"{word & 0xFFFFFFFF:032b}" for word in words)
    wrapped = string[-16:] + string
    return [int(wrapped[end : end + 16], 2) for end in range(bits, len(string) + 1, bits)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_states_are_windows_of_the_circular_string(bits: int) -> None:
    codes = torch.randint(-(2**31), 2**31, (2, 8 * bits), dtype=torch.int64).to(torch.int32)
    assert states(codes, bits).tolist() == [windows_by_hand(words, bits) for words in codes.tolist()]


def test_values_have_zero_mean_and_unit_variance() -> None:
    table = values(torch.device("cpu")).double()
    assert table.shape == (65536,)
    assert abs(float(table.mean())) < 1e-6
    assert abs(float(table.square().mean()) - 1) < 1e-6


def test_byte_sums_by_hand() -> None:
    for state in (0, 1, 0x1234, 0xFFFF):
        product = state * MULTIPLIER % 2**32
        assert int(byte_sums()[state]) == sum(product.to_bytes(4, "little"))


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (3.25, 3), (3.5, 4), (4.49, 4), (8, 8)])
def test_bits_are_rounded_to_the_nearest_whole_number(asked: float, given: int) -> None:
    assert Shift().resolve(asked, {}) == (given, ())


def test_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="'shift' has no options"):
        Shift().resolve(4, {"num_points": 5})


def test_stored_shapes() -> None:
    specs = Shift().tensors(TensorScheme("shift", 3.0, 172, 64))
    assert specs["codes"].shape == (11, 4, 24)
    assert specs["scale"].shape == (176,)


def test_decode_places_tiles_row_by_row() -> None:
    scheme = TensorScheme("shift", 2.0, 32, 48)
    codes = torch.randint(-(2**31), 2**31, (2, 3, 16), dtype=torch.int64).to(torch.int32)
    scale = torch.rand(32).half()
    weight = Shift().decode({"codes": codes, "scale": scale}, scheme)
    state = states(codes, 2)
    for row, column in [(0, 0), (15, 15), (16, 0), (31, 47), (20, 33)]:
        index = state[row // 16, column // 16, row % 16 * 16 + column % 16]
        assert float(weight[row, column]) == float(values(codes.device)[index] * scale[row].float())


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'twist' does not exist; choose one of 'shift', 'winding'"):
        hyperfunctions.get("twist")
