"""Channels of equal length: the network stays what it was, and `winding` loses less."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_hyper import HyperConfig, ShapeError, compress_module
from hf_hyper.pipeline.balance import balance_channels


def network() -> nn.Sequential:
    """Plain, depthwise, biased and linear layers, their channels of very different lengths."""
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU6(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.BatchNorm2d(24, eps=0.1),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(24 * 64, 32),
        nn.BatchNorm1d(32),
        nn.Linear(32, 10),
    )
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Conv2d):
                layer.weight *= torch.logspace(-2, 1, len(layer.weight)).view(-1, 1, 1, 1)
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 2)
                layer.bias.normal_()
        for _ in range(30):
            net(torch.randn(16, 3, 8, 8))
    return net.eval()


def lengths(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight").detach().flatten(1).norm(dim=1)


def test_outputs_stay_and_lengths_are_equal() -> None:
    net, x = network(), torch.randn(64, 3, 8, 8)
    before, was = net(x), copy.deepcopy(net)
    assert balance_channels(net, x[:2]) == ["0", "3", "7"]
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)  # float32 through three norms
    for place in (0, 3, 7):
        torch.testing.assert_close(
            lengths(net[place]), lengths(was[place]).log().mean().exp().expand_as(lengths(net[place]))
        )
    assert torch.equal(net[9].weight, was[9].weight)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_balancing_twice_is_balancing_once() -> None:
    net, x = network(), torch.randn(2, 3, 8, 8)
    balance_channels(net, x)
    once = copy.deepcopy(net.state_dict())
    balance_channels(net, x)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, once[name], msg=name)


def test_channels_of_zeros_stay() -> None:
    net, x = network(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        net[0].weight[5] = 0
    before = net(x)
    balance_channels(net, x)
    assert not net[0].weight[5].any()
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_winding_loses_less_after_it() -> None:
    net, x = network(), torch.randn(64, 3, 8, 8)
    balanced = copy.deepcopy(net)
    balance_channels(balanced, x[:2])
    config = HyperConfig(bits=5, hyperfunction="winding", modules_to_not_convert=["7", "9"])
    error = [float((compress_module(copy.deepcopy(base), config)(x) - net(x)).norm()) for base in (net, balanced)]
    assert error[1] < 0.75 * error[0]


class Both(nn.Module):
    """The output of the convolution goes into the batch norm and around it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        return y + self.norm(y)


def test_an_output_that_is_used_twice_is_refused_and_nothing_changes() -> None:
    net, x = Both().eval(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ShapeError, match=r"outputs of Both change by .* and elsewhere too"):
        balance_channels(net, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


class Extra(nn.Module):
    """A convolution with its batch norm, and one more output."""

    def __init__(self, value: float | None) -> None:
        super().__init__()
        self.convolution, self.norm, self.value = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), value

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        y = self.norm(self.convolution(x))
        return y.argmax(1) if self.value is None else (y, y * self.value)


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "change by nan"), (None, "Extra gives no floating-point tensor")]
)
def test_outputs_that_prove_nothing_are_refused(value: float | None, message: str) -> None:
    net, x = Extra(value).eval(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ShapeError, match=message):
        balance_channels(net, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_norm_behind_two_layers_is_left_alone() -> None:
    norm = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 4, 3), norm).eval()
    before = copy.deepcopy(net.state_dict())
    assert balance_channels(net, torch.randn(2, 3, 8, 8)) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
