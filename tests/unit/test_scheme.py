import pytest

from hf_hyper.errors import ConfigError
from hf_hyper.scheme import TensorScheme, padded


@pytest.mark.parametrize(
    "scheme",
    [
        TensorScheme("shift", 4.0, 576, 1536),
        TensorScheme("winding", 6.5, 1, 3, incoherence=False, options=(("num_points", 1600), ("num_shells", 3))),
        TensorScheme("shift", 3.0, 16, 64, input_blocks=2, seed=2**64 - 1),
    ],
)
def test_parse_inverts_key(scheme: TensorScheme) -> None:
    assert TensorScheme.parse(scheme.key) == scheme


def test_padding_goes_to_the_next_multiple_of_16() -> None:
    assert [padded(size) for size in (1, 16, 17, 100003)] == [16, 16, 32, 100016]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"out_features": 0}, "has no elements"),
        ({"seed": -1}, r"seed -1 is outside 0..2\*\*64-1"),
        ({"input_blocks": 3}, "input_blocks 3 does not cut 64 padded columns"),
    ],
)
def test_impossible_schemes_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TensorScheme(**{"hyperfunction": "shift", "bits": 4, "out_features": 16, "in_features": 64, **fields})


def test_text_that_is_no_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        TensorScheme.parse("shift-4")
