"""Steps from the paper to `shift`: what every step stores, all overheads counted."""

import pytest
import torch

from hf_hyper import HyperConfig, codec
from hf_hyper.bench.ablation import STEPS, schemes_within
from hf_hyper.pipeline.allocate import bits_by_loss

SHAPES = {f"{block}.{name}": (rows, 576) for block in range(9) for name, rows in (("k", 192), ("v", 192), ("q", 576))}


def config_of(step: str) -> HyperConfig:
    options = {key: value for key, value in STEPS[step].items() if key != "calibration"}
    return HyperConfig(hyperfunction="winding" if "winding" in options else "shift", **options)


@pytest.mark.parametrize("step", ["paper", "box", "search", "direction"])
def test_steps_of_the_paper_store_at_most_6_5_bits(step: str):
    schemes = schemes_within(config_of(step), SHAPES)
    weights = sum(scheme.num_weights for scheme in schemes.values())
    assert sum(codec.bits_per_weight(scheme) * scheme.num_weights for scheme in schemes.values()) <= 6.5 * weights
    below = {name: scheme for name, scheme in schemes.items() if scheme.bits < 6.5}
    assert list(below) == ["4.v"]  # a small layer in the middle of the network
    assert below["4.v"].option("num_points") == 2**12 // 4 - 1
    rest = {scheme.option("num_points") for name, scheme in schemes.items() if name not in below}
    assert rest == ({2047} if step == "direction" else {1600})
    assert {scheme.option("num_shells") for scheme in schemes.values()} == {3}


@pytest.mark.parametrize("step", ["scales", "incoherence", "4 bits", "shift"])
def test_other_steps_have_one_rate(step: str):
    config = config_of(step)
    assert schemes_within(config, SHAPES) == {name: config.scheme(*shape) for name, shape in SHAPES.items()}


def test_calibrated_step_is_two_thirds_of_the_paper_wherever_its_bits_go():
    config = HyperConfig(**STEPS["calibrated 4.3"])
    assert config.bits_follow_loss
    shapes = {f"{name}.{layer}": shape for layer in range(40) for name, shape in (("q", (576, 576)), ("k", (192, 576)))}
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    draw = torch.Generator().manual_seed(0)
    losses = {name: size * float(10 ** torch.randn(1, generator=draw)) for name, size in sizes.items()}
    rates = bits_by_loss(sizes, losses, config.bits)
    schemes = [config.scheme(*shape, bits=rates[name]) for name, shape in shapes.items()]
    weights = sum(scheme.num_weights for scheme in schemes)
    assert sum(codec.bits_per_weight(scheme) * scheme.num_weights for scheme in schemes) / weights <= 6.5 * 2 / 3
