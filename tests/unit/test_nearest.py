"""Nearest node of `winding`: every search finds what brute force finds."""

import math
import subprocess
import sys

import pytest
import torch
from helpers import winding_scheme
from torch import Tensor

from hf_hyper import _native
from hf_hyper.encoders.halving import nearest_brute_force, nearest_by_halving
from hf_hyper.encoders.nearest import nearest
from hf_hyper.errors import ConfigError
from hf_hyper.hyperfunctions.winding import DIRECTIONS, nodes

CPU = torch.device("cpu")


def awkward_cases() -> list[tuple[str, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    grid = (normal(300, 2) * 8).round() / 8
    return [
        ("ties", (normal(3000, 2) * 16).round() / 16, grid),
        ("repeated", normal(500, 2), torch.cat([grid, grid])),
        ("one node", normal(100, 2), normal(1, 2)),
        ("equal nodes", normal(100, 2), torch.ones(50, 2)),
        ("line", normal(1000, 2) * torch.tensor([1.0, 0.0]), normal(200, 2) * torch.tensor([0.0, 1.0])),
        ("one point", normal(1, 2), normal(200, 2)),
        ("equal points", torch.ones(100, 2), normal(200, 2)),
        ("clustered", normal(3000, 2), normal(500, 2) * torch.rand(500, 1, generator=generator) ** 9),
        ("distant", normal(1000, 2) * 1e-3 + 1000, normal(300, 2) * 1e-3 + 1000),
        ("tiny", normal(1000, 2) * 1e-22, normal(300, 2) * 1e-22),
        ("large", normal(1000, 2) * 1e17, normal(300, 2) * 1e17),
        ("outlier", torch.cat([normal(3000, 2), torch.tensor([[1e6, -1e6]])]), normal(300, 2)),
        ("no points", normal(0, 2), normal(3, 2)),
    ]


@pytest.mark.parametrize(("points", "grid"), [pytest.param(p, n, id=name) for name, p, n in awkward_cases()])
def test_nearest_is_brute_force_on_awkward_input(points: Tensor, grid: Tensor):
    assert torch.equal(nearest(points, grid), nearest_brute_force(points, grid, chunk=1 << 16))


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("num_points", [1, 2, 15, 255, 2047])
def test_nearest_is_brute_force_on_every_direction(name: str, num_points: int):
    unit = nodes(winding_scheme(num_points=num_points, direction=name), CPU)
    points = torch.rand(4000, 2, generator=torch.Generator().manual_seed(1)) - 0.5
    index = nearest(points, unit)
    assert torch.equal(index, nearest_brute_force(points, unit))
    assert (index < len(unit)).all()


def test_nodes_are_nearest_to_themselves():
    unit = nodes(winding_scheme(bits=6.5), CPU)
    assert torch.equal(unit[nearest(unit, unit).long()], unit)


@pytest.mark.skipif(_native.load() is None, reason="no compiled core")
@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("threads", [1, 3])
def test_native_search_depends_on_neither_isa_nor_threads(isa: str, threads: int):
    unit = nodes(winding_scheme(bits=5), CPU)
    points = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(2)) * 0.2
    _native.set_isa(isa)
    try:
        assert torch.equal(_native.winding_nearest(points, unit, threads), nearest_brute_force(points, unit))
    finally:
        _native.set_isa("auto")


@pytest.mark.slow
@pytest.mark.skipif(_native.load() is None, reason="no compiled core")
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory in KiB is Linux's")
def test_native_search_stays_bounded_for_nodes_on_a_circle():
    """All nodes are near the centre of a circle: lists of every candidate would take 130 MB here."""
    script = (
        "import math, resource, torch\n"
        "from hf_hyper import _native\n"
        "angle = torch.arange(20_000) * (2 * math.pi / 20_000)\n"
        "circle = torch.stack([angle.cos(), angle.sin()], 1) * 0.5\n"
        "points = torch.randn(300, 2, generator=torch.Generator().manual_seed(3)) * 1e-5\n"
        "_native.winding_nearest(points, circle[:10], 1)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "index = _native.winding_nearest(points, circle, 1)\n"
        "grown = peak() - before\n"
        "assert grown < 64 << 10, grown\n"
        "found = (points - circle[index.long()]).square().sum(1)\n"
        "assert (found - torch.cdist(points[:9], circle).amin(1).square().mean()).abs().max() < 1e-4\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


@pytest.mark.skipif(_native.load() is None, reason="no compiled core")
def test_native_search_refuses_non_finite_points():
    with pytest.raises(ConfigError, match="NaN"):
        _native.winding_nearest(torch.tensor([[0.0, math.nan]]), torch.zeros(1, 2))


@pytest.mark.parametrize(("points", "grid"), [pytest.param(p, n, id=name) for name, p, n in awkward_cases()])
def test_halving_is_brute_force_on_awkward_input(points: Tensor, grid: Tensor):
    assert torch.equal(nearest_by_halving(points, grid), nearest_brute_force(points, grid, chunk=1 << 16))


@pytest.mark.parametrize("together", [1, 2, 3, 4])
def test_halving_is_brute_force_in_every_dimension(together: int):
    generator = torch.Generator().manual_seed(together)
    points = torch.randn(5000, together, generator=generator)
    unit = nodes(winding_scheme(num_points=900, dimension=together), CPU)
    grid = torch.cat([unit, 3 * unit, torch.randn(50, together, generator=generator)])
    assert torch.equal(nearest_by_halving(points, grid), nearest_brute_force(points, grid))
    assert torch.equal(nearest(points, grid), nearest_brute_force(points, grid))
