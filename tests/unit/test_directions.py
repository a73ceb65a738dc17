"""Directions of `winding`, its nodes, and the bound on the holes that they leave."""

import math

import mpmath
import numpy as np
import pytest
import torch
from helpers import winding_scheme
from torch import Tensor

from hf_hyper.hyperfunctions.directions import direction, dispersion_bound
from hf_hyper.hyperfunctions.winding import DIRECTIONS, nodes

CPU = torch.device("cpu")


def test_plastic_direction_is_the_plastic_number_to_32_bits():
    with mpmath.workdps(40):
        plastic = mpmath.findroot(lambda x: x**3 - x - 1, 1.32)
        wanted = tuple(int(mpmath.floor(2**32 / plastic**power)) for power in (1, 2))
    assert direction("plastic", 1600) == wanted


def test_lattice_direction_is_the_released_one():
    assert direction("lattice", 1600) == (2**32 // 1600, -(-(2**32) // 40))
    theta = np.arange(1600)
    released = np.stack([theta / 1600, theta / 40 % 1], 1) - 0.5
    of = winding_scheme(num_points=1600, direction="lattice")
    np.testing.assert_allclose(nodes(of, CPU)[1:].numpy(), released, atol=1e-6)  # 1600 steps of at most 2^-32


@pytest.mark.parametrize("num_points", [1, 2, 3, 63, 255, 1600, 2047, 16383])
def test_hexagonal_slope_is_the_half_integer_closest_to_an_equilateral_cell(num_points: int):
    turn = direction("hexagonal", num_points)[1]
    ideal = math.sqrt(num_points * math.sqrt(0.75))
    slope = 2**32 / (turn or 2**33)
    assert abs(slope - ideal) <= 0.5 + 1e-6
    assert slope % 1 == pytest.approx(0.5, abs=1e-5)


def test_hexagonal_nodes_have_six_neighbours_at_about_one_distance():
    orbit = nodes(winding_scheme(num_points=1600, direction="hexagonal"), CPU)[1:]
    inner = orbit[orbit.abs().amax(1) < 0.4]
    distance = torch.cdist(inner.double(), orbit.double()).topk(8, largest=False).values[:, 1:]
    assert (distance[:, 5] / distance[:, 0]).max() < 1.05
    assert (distance[:, 6] / distance[:, 5]).min() > 1.5


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("num_points", [1, 2, 1600, 2047])
def test_nodes_follow_the_integer_orbit(name: str, num_points: int):
    of = winding_scheme(num_points=num_points, direction=name)
    turn = direction(name, num_points)
    wanted = [[0.0, 0.0]]
    wanted += [[(theta * a % 2**32 - 2**31) / 2**32 for a in turn] for theta in range(num_points)]
    assert torch.equal(nodes(of, CPU), torch.tensor(wanted, dtype=torch.float64).float())


@pytest.mark.parametrize("together", [1, 2, 3, 4])
def test_plastic_powers_in_every_dimension(together: int):
    with mpmath.workdps(40):
        root = mpmath.findroot(lambda x: x ** (together + 1) - x - 1, 1.3)
        wanted = tuple(int(mpmath.floor(2**32 / root**power)) for power in range(1, together + 1))
    assert direction("plastic", 1600, together) == wanted
    assert direction("golden", 1600, together)[together > 1 :] == direction("plastic", 1, max(1, together - 1))


def test_primes_are_square_roots():
    with mpmath.workdps(40):
        wanted = tuple(int(mpmath.floor(mpmath.frac(mpmath.sqrt(p)) * 2**32)) for p in (2, 3, 5, 7))
    assert direction("primes", 1600, 4) == wanted


def holes(orbit: Tensor, count: int) -> Tensor:
    """Distance on the torus from random points to the orbit: `[count]`."""
    points = torch.rand(count, orbit.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(7)) - 0.5
    least = []
    for block in points.split(200):
        offset = (block.unsqueeze(1) - orbit).abs()
        least.append(torch.minimum(offset, 1 - offset).square().sum(2).min(1).values.sqrt())
    return torch.cat(least)


@pytest.mark.parametrize("together", [1, 2, 3, 4])
@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("num_points", [64, 1600])
def test_no_hole_is_larger_than_the_bound(name: str, together: int, num_points: int):
    turn = direction(name, num_points, together)
    orbit = nodes(winding_scheme(num_points=num_points, direction=name, dimension=together), CPU)[1:].double()
    largest = float(holes(orbit, 2000).max())
    bound = dispersion_bound(turn, num_points)
    assert largest <= bound + 1e-7  # nodes are rounded to float32
    assert bound < 3 * largest


@pytest.mark.parametrize("together", [1, 2, 3, 4])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_bound_falls_as_the_root_of_the_number_of_points(name: str, together: int):
    counts = [64, 256, 1024, 1600, 2048]
    scaled = [n ** (1 / together) * dispersion_bound(direction(name, n, together), n) for n in counts]
    assert max(scaled) < {1: 2.0, 2: 2.7, 3: 2.1, 4: 2.1}[together]
