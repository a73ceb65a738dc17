"""Encoder of `winding`: the nearest of all codes, boxes and shells, tensors that are out of the ordinary."""

import pytest
import torch
from helpers import decode_winding, winding_codes, winding_scheme
from torch import Tensor

from hf_hyper import _native, hyperfunctions
from hf_hyper.encoders import EFFORTS, encode
from hf_hyper.encoders.halving import nearest_brute_force
from hf_hyper.encoders.nearest import assign, shells
from hf_hyper.hyperfunctions.winding import nodes

CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", [2, 4, 6.5])
def test_balanced_takes_the_nearest_of_all_codes(trained: Tensor, bits: float):
    of = winding_scheme(*trained.shape, bits=bits)
    tensors = encode(trained, of)
    side, unit = tensors["shell_side"].double(), nodes(of, CPU)
    everything = ((side / side[-1]).float().view(-1, 1, 1) * unit).flatten(0, 1)
    points = (trained.double().view(-1, 2) - tensors["centre"].double()) / side[-1]
    assert torch.equal(winding_codes(tensors, of).flatten(), nearest_brute_force(points.float(), everything).long())


def test_more_effort_and_more_bits_lower_the_error(trained: Tensor):
    def error(bits: float, effort: str) -> float:
        of = winding_scheme(*trained.shape, bits=bits)
        return float((decode_winding(encode(trained, of, effort), of) - trained).square().mean())

    by_effort = [error(4, effort) for effort in EFFORTS]
    assert by_effort[1] < 0.9 * by_effort[0]
    assert by_effort[2] <= by_effort[1]
    assert error(3, "balanced") > by_effort[1] > error(5, "balanced") > error(6, "balanced")


@pytest.mark.parametrize("effort", EFFORTS)
def test_weights_on_codes_are_kept(effort: str):
    """decode_winding(encode(p)) = p for the points of the box, and of the shells beyond it."""
    of = winding_scheme(bits=5)
    side = torch.tensor([1.0, 2.0, 3.0, 4.0])
    unit = nodes(of, CPU)
    points = (side.view(-1, 1, 1) * unit).double()
    distance, box = points.norm(dim=2), points.abs().amax(2)
    beyond = torch.cat([torch.zeros(1), side[:-1]]).view(-1, 1) / 2
    own = (distance > beyond) & (distance <= side.view(-1, 1) / 2) & ((box > 0.5) | (side == 1).view(-1, 1))
    kept = points[own]
    codes = assign(kept, side, of, effort)
    decoded = side[codes // len(unit)].unsqueeze(1) * unit[codes % len(unit)]
    assert len(kept) > 2 * len(unit)
    torch.testing.assert_close(decoded.double(), kept, rtol=0, atol=1e-6)  # float32 at magnitudes up to 2


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.zeros(4, 6), id="zeros"),
        pytest.param(torch.full((4, 6), 0.1), id="constant"),
        pytest.param(torch.tensor([[3.0]]), id="one weight"),
        pytest.param(torch.tensor([[3.0, -2.0, 1.0]]), id="one row"),
        pytest.param(torch.tensor([[3.0], [-2.0], [1.0]]), id="one column"),
        pytest.param(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 1e30, id="huge"),
        pytest.param(torch.tensor([[3.4e38, -3.4e38], [3.4e38, 3.4e38]]), id="largest"),
        pytest.param(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 1e-41, id="subnormal"),
        pytest.param(torch.eye(8) * 1e-45, id="smallest"),
        pytest.param(torch.eye(64) * 1e6, id="outliers"),
        pytest.param(torch.rand(8, 7, generator=torch.Generator().manual_seed(0)) - 0.5, id="nothing outside"),
    ],
)
def test_degenerate_tensors(weight: Tensor, effort: str):
    of = winding_scheme(*weight.shape, bits=6.5)
    tensors = encode(weight, of, effort)
    specs = hyperfunctions.get("winding").tensors(of)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    decoded = decode_winding(tensors, of)
    assert decoded.isfinite().all()
    # 2047 points in a box of side 4 * largest are 0.1 * largest apart; the largest float32 saturate at half.
    room = 0.11 * float(weight.double().abs().max()) + 2.0**-148
    if weight.abs().max() < 1e38:
        assert (decoded.double() - weight).abs().max() <= room


@pytest.mark.parametrize("value", [0.0, 0.1, -3e30])
def test_constant_tensors_are_exact(value: float):
    of = winding_scheme(5, 9)
    weight = torch.full((5, 9), value)
    assert torch.equal(decode_winding(encode(weight, of), of), weight)


def test_a_fixed_box_side_is_kept(trained: Tensor):
    of = winding_scheme(*trained.shape, bits=5, box_side=0.25)
    for effort in EFFORTS:
        assert float(encode(trained, of, effort)["shell_side"][0]) == 0.25


def test_large_matrices_are_encoded_in_blocks(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(40, 31, generator=torch.Generator().manual_seed(3))
    of = winding_scheme(40, 31)
    whole = encode(weight, of)
    monkeypatch.setattr("hf_hyper.encoders.nearest._BLOCK", 64)
    assert all(torch.equal(encode(weight, of)[name], whole[name]) for name in whole)


def test_shells_hold_every_point():
    of = winding_scheme(bits=4)
    sample = torch.randn(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    side = shells(sample, 20.0, torch.zeros(2), of, "balanced")
    assert float(side[-1]) == 40.0
    assert (side.diff() > 0).all()


def test_without_the_core_the_tensors_are_the_same(monkeypatch: pytest.MonkeyPatch, trained: Tensor):
    of = winding_scheme(*trained.shape, bits=4)
    fast = encode(trained, of)
    monkeypatch.setattr(_native, "load", lambda: None)
    monkeypatch.setattr(_native, "say_if_absent", lambda: None)
    slow = encode(trained, of)
    assert all(torch.equal(fast[name], slow[name]) for name in fast)
