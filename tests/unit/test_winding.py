"""`winding`: rates, options, and what is stored."""

import pytest
import torch
from helpers import decode_winding, winding_scheme

from hf_hyper import hyperfunctions
from hf_hyper.encoders import encode
from hf_hyper.errors import ConfigError
from hf_hyper.hyperfunctions.winding import WindingOptions, code_width
from hf_hyper.scheme import TensorScheme

PAPER = {"num_points": 1600, "num_shells": 3, "box_side": 0.1, "direction": "lattice"}


def test_paper_settings_are_6_5_bits_per_weight():
    of = winding_scheme(64, 4096, bits=4, **PAPER)
    assert of.bits == 6.5
    assert code_width(of) == 13 == ((3 + 1) * (1600 + 1) - 1).bit_length()
    specs = hyperfunctions.get("winding").tensors(of)
    assert 8 * specs["codes"].num_bytes == 64 * 4096 * 6.5
    assert {name: spec.shape for name, spec in specs.items()} == {
        "codes": (64, 832),
        "centre": (2,),
        "shell_side": (4,),
    }


@pytest.mark.parametrize(("bits", "rate"), [(1.5, 1.5), (2, 2.0), (3.25, 3.5), (4, 4.0), (6.5, 6.5), (7.9, 8.0)])
def test_num_points_is_the_largest_that_fits(bits: float, rate: float):
    of = winding_scheme(bits=bits)
    points = of.option("num_points")
    assert of.bits == rate
    assert 4 * (points + 1) <= 2 ** (2 * rate) < 4 * (points + 2)


def test_rates_of_three_weights_are_thirds():
    of = winding_scheme(bits=4.2, dimension=3)
    assert code_width(of) == 13
    assert of.bits == 13 / 3


def test_smallest_rate_works_with_one_shell():
    of = winding_scheme(bits=1, num_shells=1)
    assert (of.bits, of.option("num_points")) == (1.0, 1)
    assert decode_winding(encode(torch.randn(16, 16), of), of).isfinite().all()


def test_scheme_survives_its_key():
    of = winding_scheme(bits=3, box_side=0.05)
    assert TensorScheme.parse(of.key) == of
    assert of.option("box_side") == 50_000_000


def test_defaults_are_those_of_the_options_class():
    given = {name: getattr(WindingOptions(), name) for name in ("num_shells", "direction", "box_side")}
    assert winding_scheme(bits=4) == winding_scheme(bits=4, **given)


@pytest.mark.parametrize(
    ("bits", "options", "match"),
    [
        (1, {}, r"bits >= 1\.5 or num_shells <= 1"),
        (4, {"num_points": 2**23}, "num_points <= 4194303"),
        (4, {"num_shells": 0}, "num_shells is 0"),
        (4, {"num_points": 0}, "num_points is 0"),
        (4, {"box_side": -1.0}, "box_side is -1.0"),
        (4, {"direction": "platinum"}, "'hexagonal', 'lattice', 'plastic'"),
        (4, {"points": 3}, r"no option \['points'\]"),
    ],
)
def test_impossible_settings_say_what_would_fit(bits: float, options: dict[str, object], match: str):
    with pytest.raises(ConfigError, match=match):
        hyperfunctions.get("winding").resolve(bits, options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dimension": 5}, "dimension is 5, wanted 1, 2, 3 or 4"),
        ({"loss_max": 0}, "loss_max is 0, wanted None or a positive"),
        ({"group_size": 4}, "group_size is 4, wanted None or an integer from 8"),
        ({"incoherence": 1}, "incoherence is 1, wanted True or False"),
    ],
)
def test_mistakes_in_the_other_options(options: dict[str, object], match: str):
    with pytest.raises(ConfigError, match=match):
        WindingOptions(**options)


def test_codes_that_do_not_fit_the_rate_are_refused():
    of = winding_scheme(bits=4)
    wrong = TensorScheme("winding", 3.5, 16, 16, incoherence=False, options=of.options)
    with pytest.raises(ConfigError, match=r"256 codes of 2 weights, which 3\.5 bits"):
        hyperfunctions.get("winding").tensors(wrong)


def test_incoherence_stores_the_padded_matrix():
    rate, constants = hyperfunctions.get("winding").resolve(4, {})
    of = TensorScheme("winding", rate, 30, 20, incoherence=True, options=constants)
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    tensors = encode(weight, of)
    assert tensors["codes"].shape == (32, 4)
    assert float((decode_winding(tensors, of) - weight).square().mean()) < 0.02


@pytest.mark.parametrize("columns", [1, 2, 3, 17, 33])
def test_rows_decode_alone_at_any_width(columns: int):
    of = winding_scheme(6, columns, bits=4.5)
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(columns))
    tensors = encode(weight, of)
    decoded = decode_winding(tensors, of)
    assert decoded.shape == weight.shape
    for row in range(6):
        assert torch.equal(decode_winding({**tensors, "codes": tensors["codes"][row : row + 1]}, of)[0], decoded[row])


def test_bit_patterns_beyond_the_last_code_decode_finite():
    of = winding_scheme(4, 8, **PAPER)
    tensors = encode(torch.randn(4, 8), of)
    assert decode_winding({**tensors, "codes": torch.full_like(tensors["codes"], -1)}, of).isfinite().all()
