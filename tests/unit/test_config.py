import json

import pytest
from transformers.quantizers.auto import AutoQuantizationConfig

import hf_hyper
from hf_hyper import ConfigError, FormatError, HyperCompressionConfig, HyperConfig
from hf_hyper.quantizer import register


def test_both_names_are_one_class() -> None:
    assert HyperCompressionConfig is HyperConfig


def test_registering_again_does_nothing() -> None:
    register()
    assert AutoQuantizationConfig.from_dict({"quant_method": "hyper", "bits": 3}).bits == 3.0


def test_config_survives_json() -> None:
    config = HyperConfig(bits=3.25, effort="fast", seed=5, modules_to_not_convert=["lm_head"])
    config.record("layers.0.q", config.scheme(64, 128))
    again = HyperConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.recorded("layers.0.q", 64, 128) == config.scheme(64, 128)


def test_winding_options_survive_json() -> None:
    options = {"num_points": 1600, "num_shells": 3, "box_side": 0.1}
    config = HyperConfig(bits=6.5, hyperfunction="winding", winding=options)
    config.record("layers.0.q", config.scheme(64, 128))
    again = HyperConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.recorded("layers.0.q", 64, 128) == config.scheme(64, 128)


def test_newer_format_asks_for_an_upgrade() -> None:
    with pytest.raises(FormatError, match=r"version 2.*up to 1; upgrade with: pip install -U hf-hyper"):
        HyperConfig.from_dict({"quant_method": "hyper", "format_version": 2, "something_new": True})


def test_bits_that_are_not_known_yet_stay_open() -> None:
    config = HyperConfig("auto", max_kl=0.05, calibration="self")
    assert config.to_dict()["bits"] == "auto"
    assert HyperConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.bits = 3.25
    config.record("layer", config.scheme(32, 32, 3))
    assert HyperConfig.from_dict(config.to_dict()).bits == 3.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0.5}, "bits is 0.5, wanted a number from 1 to 8"),
        ({"bits": 9}, "bits is 9, wanted"),
        ({"bits": "4"}, "bits is '4', wanted"),
        ({"bits": float("nan")}, "bits is nan, wanted"),
        ({"effort": "max"}, "effort is 'max', wanted one of 'fast', 'balanced', 'best'"),
        ({"seed": -1}, "seed is -1, wanted"),
        ({"hyperfunction": "twist"}, "hyperfunction 'twist' does not exist"),
        ({"modules_to_not_convert": "lm_head"}, r"write \['lm_head'\]"),
        ({"winding": {"num_points": 5}}, "winding options given with hyperfunction 'shift'; choose 'winding'"),
        ({"hyperfunction": "winding", "winding": {"points": 5}}, "wanted a dict with keys from"),
        ({"bits": "auto"}, "got bits 'auto' without max_kl, wanted both or neither"),
        ({"max_kl": 0.1, "calibration": "self"}, "got max_kl 0.1 with bits 4, wanted both or neither"),
        ({"bits": "auto", "max_kl": 0.1}, "max_kl needs calibration .* got no calibration; leave it out"),
        ({"bits": "auto", "max_kl": 0.1, "calibration": "self", "rounding": "ldlq"}, "got rounding 'ldlq'"),
        ({"bits": "auto", "max_kl": 0.1, "calibration": "self", "allocation": "size"}, "got allocation 'size'"),
        ({"bits": "auto", "max_kl": 0, "calibration": "self"}, "max_kl is 0, wanted a positive number of nats"),
        ({"bits": "auto", "max_kl": "low", "calibration": "self"}, "max_kl is 'low', wanted a positive number"),
        ({"group_size": 64}, r"HyperConfig has no option \['group_size'\]"),
    ],
)
def test_mistakes_get_one_clear_error(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HyperConfig(**options)


def test_public_names_exist() -> None:
    assert all(hasattr(hf_hyper, name) for name in hf_hyper.__all__)
