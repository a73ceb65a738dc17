"""Rates of layers by their size and by their loss, and batch norms after compression."""

import copy
import itertools

import pytest
import torch
from torch import nn

from hf_hyper import ConfigError, HyperConfig, ShapeError, compress_module
from hf_hyper.encoders.shift import DISTORTION
from hf_hyper.pipeline.allocate import bits_by_loss, bits_within_loss, mixed_bits, rates_between, spread_bits
from hf_hyper.pipeline.batchnorm import align_batch_norms, align_bias


@pytest.mark.parametrize(("average", "step"), [(3, 1.0), (4.4, 1.0), (5.5, 0.5)])
def test_small_layers_get_more_and_the_average_is_kept(average: float, step: float) -> None:
    sizes = {f"layer{i}": 900 * 4**i for i in range(6)}
    bits = spread_bits(sizes, average, step)
    rates = [bits[name] for name in sizes]
    assert rates == sorted(rates, reverse=True)
    assert all(rate % step == 0 and 2 <= rate <= 8 for rate in rates)
    spent = sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert average - step <= spent <= average


@pytest.mark.parametrize("average", [2.25, 3.5, 4.1, 6.75])
def test_fractional_rates_are_met_by_whole_bits(average: float) -> None:
    sizes = {
        f"{layer}.{name}": size for layer in range(30) for name, size in {"q": 9, "k": 3, "up": 24, "down": 24}.items()
    }
    bits = mixed_bits(sizes, average)
    assert set(bits.values()) <= {int(average), int(average) + 1}
    spent = sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert average * 0.995 <= spent <= average
    assert bits["0.k"] == int(average) + 1


def test_no_other_rates_lose_less() -> None:
    draw = torch.Generator().manual_seed(0)
    for average in (2.0, 2.4, 3.6, 8.0):
        names = "abcde"
        losses = dict(zip(names, (4 ** torch.randn(5, generator=draw)).tolist(), strict=True))
        bits = bits_by_loss(dict.fromkeys(names, 100), losses, average)

        def loss(rates: tuple[float, ...], losses: dict[str, float] = losses) -> float:
            return sum(each * DISTORTION[int(rate)] for each, rate in zip(losses.values(), rates, strict=True))

        around = range(max(1, int(average) - 1), min(8, int(average) + 2) + 1)
        best = min(loss(rates) for rates in itertools.product(around, repeat=5) if sum(rates) <= 5 * average + 1e-6)
        assert loss(tuple(bits.values())) == pytest.approx(best)


@pytest.mark.parametrize("average", [1, 1.75, 2.25, 3, 3.5, 4.1, 7.9])
def test_rates_by_loss_meet_the_average(average: float) -> None:
    draw = torch.Generator().manual_seed(1)
    sizes = {f"{layer}.{name}": size for layer in range(30) for name, size in {"q": 9, "k": 3, "up": 24}.items()}
    losses = {name: size * float(10 ** torch.randn(1, generator=draw)) for name, size in sizes.items()}
    bits = bits_by_loss(sizes, losses, average)
    spent = sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert average * 0.995 <= spent <= average
    assert all(max(1, int(average) - 1) <= rate <= min(8, int(average) + 2) for rate in bits.values())


@pytest.mark.parametrize("bound", [1e-3, 0.003, 0.05, 2.0, 1e6])
def test_the_fewest_bits_within_a_loss(bound: float) -> None:
    draw = torch.Generator().manual_seed(2)
    sizes = {f"{layer}.{name}": size for layer in range(30) for name, size in {"q": 9, "k": 3, "up": 24}.items()}
    losses = {name: size / 100 * float(3 ** torch.randn(1, generator=draw)) for name, size in sizes.items()}
    counted = {name: loss * float(1.2 ** torch.randn(1, generator=draw)) for name, loss in losses.items()}
    bits = bits_within_loss(sizes, losses, counted, bound)

    def expected(rates: dict[str, float]) -> float:
        return sum(counted[name] * DISTORTION[int(rate)] for name, rate in rates.items())

    assert expected(bits) <= bound
    average = sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert average == 1 or expected(bits_by_loss(sizes, losses, average - 0.05)) > bound


def test_a_loss_that_8_bits_cannot_meet() -> None:
    with pytest.raises(ConfigError, match=r"max_kl 1e-06 is below the 2.3e-05 that 8 bits are expected to cost"):
        bits_within_loss({"a": 5}, {"a": 1.0}, {"a": 1.0}, 1e-6)


def test_what_the_loss_does_not_feel_gets_least() -> None:
    assert bits_by_loss({"a": 5, "b": 5, "c": 5}, {"a": 0.0, "b": 1.0, "c": 1.0}, 3.4) == {"a": 2, "b": 4, "c": 4}


def test_whole_rates_are_left_alone() -> None:
    assert mixed_bits({"a": 5, "b": 7}, 4) == {"a": 4, "b": 4}


def test_a_module_meets_a_fractional_rate() -> None:
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    made = compress_module(net, HyperConfig(bits=3.5, effort="fast")).hyper_config
    assert sorted(record["bits"] for record in made.tensor_schemes.values()) == [3, 3, 4, 4]


def test_winding_mixes_rates_half_a_bit_apart() -> None:
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    config = HyperConfig(bits=4.25, hyperfunction="winding")
    made = compress_module(net, config).hyper_config
    assert sorted(record["bits"] for record in made.tensor_schemes.values()) == [4, 4, 4.5, 4.5]


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 6.5, "hyperfunction": "winding"},
        {"bits": 14 / 3, "hyperfunction": "winding", "winding": {"dimension": 3}},
        {"bits": 4.1, "hyperfunction": "winding", "winding": {"num_points": 1600}},
        {"bits": 1.6, "hyperfunction": "winding", "winding": {"dimension": 1, "num_shells": 1}},
    ],
    ids=["whole", "half", "third", "points given", "lower rate too small"],
)
def test_rates_that_every_layer_can_have_are_left_alone(options: dict) -> None:
    assert rates_between(HyperConfig(**options), {"a": 100, "b": 200}) == {}


def test_a_module_cannot_be_calibrated() -> None:
    with pytest.raises(ConfigError, match="cannot calibrate"):
        compress_module(nn.Linear(64, 64), HyperConfig(calibration="default"))


def test_four_times_the_weights_is_one_bit_less() -> None:
    assert spread_bits({"a": 1000, "b": 4000, "c": 16000}, 4.3) == {"a": 6.0, "b": 5.0, "c": 4.0}


def test_layers_of_one_size_get_the_same() -> None:
    assert set(spread_bits({"a": 500, "b": 500, "c": 500}, 4.5).values()) == {4.0}


def test_single_layers_take_their_own_rate() -> None:
    net = compress_module(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), HyperConfig(bits=4), {"1": 6})
    assert [layer.scheme.bits for layer in net] == [4.0, 6.0]
    assert net.hyper_config.tensor_schemes["1"]["bits"] == 6.0


def blocks() -> nn.Sequential:
    sides = (16, 24, 32, 24, 16)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sides):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for _ in range(30):
            net(torch.randn(8, 16, 8, 8) + 0.5)
    return net.eval()


@torch.no_grad()
def test_aligned_batch_norms_bring_the_outputs_closer() -> None:
    net = blocks()
    compressed = compress_module(copy.deepcopy(net), HyperConfig(bits=2))
    x = torch.randn(32, 16, 8, 8) + 0.5
    before = float((compressed(x) - net(x)).norm())
    align_batch_norms(net, compressed, torch.randn(32, 16, 8, 8) + 0.5)
    assert float((compressed(x) - net(x)).norm()) < 0.97 * before
    assert not any(norm._forward_pre_hooks for norm in compressed.modules())


@torch.no_grad()
def test_aligning_a_copy_changes_nothing() -> None:
    net = blocks()
    same = copy.deepcopy(net)
    align_batch_norms(net, same, torch.randn(4, 16, 8, 8))
    for (name, got), wanted in zip(same.state_dict().items(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted, msg=name)


def test_other_networks_are_refused() -> None:
    with pytest.raises(ShapeError, match="4 and 0 batch norms"):
        align_batch_norms(blocks(), nn.Sequential(nn.Conv2d(16, 24, 3)), torch.randn(1, 16, 8, 8))


def test_an_aligned_bias_gives_the_mean_of_the_original() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    compressed = compress_module(copy.deepcopy(net), HyperConfig(bits=2))
    x = torch.randn(128, 64)
    align_bias(net, compressed, "2", x)
    assert torch.allclose(compressed(x).mean(0), net(x).mean(0), atol=1e-5)
    assert not torch.allclose(compressed(x), net(x), atol=0.1)


def test_a_layer_without_a_bias_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    with pytest.raises(ShapeError, match="0 has no bias"):
        align_bias(net, copy.deepcopy(net), "0", torch.randn(2, 8))
