"""Directions of the winding: the vector by which T turns the torus, and how finely the orbit fills it.

| name | a, for U points in K dimensions | |
|---|---|---|
| `hexagonal` | K = 1: 1/U; K = 2: half-integer slope; K = 3, 4: the best of some (1, g, g², ...) / U | lattice |
| `lattice` | 1/U and powers of 1/q, q = ceil(U^(1/K)), as in the released code: a sheared cubic grid | lattice |
| `plastic` | powers of 1/rho with rho^(K+1) = rho + 1: golden number, plastic number, ... | irrational |
| `golden` | 1/U, then `plastic` of one dimension less: for K = 2 the golden spiral of U points | half and half |
| `primes` | fractional parts of the square roots of 2, 3, 5, 7 | irrational |

The irrational ones are badly approximable or believed to be: no small multiple of a is close to a point with whole
coordinates, so that points of the orbit keep away from each other and leave no large hole.
"""

import functools
import math
from fractions import Fraction

import torch

__all__ = ["TURN", "direction", "dispersion_bound"]

TURN = 1 << 32
"""Units in a full turn."""

_CANDIDATES = 256
_MOST_WORK = 1 << 22
_NEIGHBOURS = 24


@functools.cache
def direction(name: str, num_points: int, dimension: int = 2) -> tuple[int, ...]:
    """The vector by which T turns the torus, in units of 2^-32 of a turn.

    In two dimensions `hexagonal` and `lattice` cross the box once in the first coordinate while the second goes up and
    wraps around every `slope` points. With slope q neighbouring columns are level and the cell is a square sheared by
    1 / q; with q - 1/2 they are half a step apart, and at q * q = U * sqrt(3) / 2 three neighbours make an equilateral
    triangle, the best arrangement in the plane. Rounding up the second coordinate keeps a point that closes a column at
    the bottom of the box instead of letting it fall just short of the top.

    Args:
        name: One of `winding.DIRECTIONS`.
        num_points: Length U of the orbit, at least 1.
        dimension: K, 1 to 4.

    Returns:
        `(A_1, ..., A_K)`, each in `[0, 2**32)`.
    """
    first = TURN // num_points % TURN
    if name == "plastic":
        return _plastic(dimension)
    if name == "golden":
        return _plastic(1) if dimension == 1 else (first, *_plastic(dimension - 1))
    if name == "primes":
        return tuple(math.isqrt(prime * TURN * TURN) % TURN for prime in (2, 3, 5, 7)[:dimension])
    if dimension == 1:
        return (first,)
    if name == "lattice":
        side = _root_above(num_points, dimension)
        return first, *(-(-TURN // side**power) % TURN for power in range(dimension - 1, 0, -1))
    if dimension == 2:
        twice_slope = 2 * math.isqrt(math.isqrt(3 * num_points * num_points // 4)) + 1
        return first, -(-2 * TURN // twice_slope) % TURN
    return _widest_multiples(num_points, dimension)


def dispersion_bound(turn: tuple[int, ...], num_points: int) -> float:
    """Distance within which every point of the unit torus has a point of the orbit.

    For q <= U the first q points lie within |q a - p| of the lattice that the rational direction p / q generates, p
    being q a rounded; its covering radius is at most half the diagonal of the box that a reduced basis makes orthogonal
    (Babai). The bound is the least sum of the two over some q. Where a is badly approximable it falls as U^(-1/K).

    Args:
        turn: `(A_1, ..., A_K)`, as `direction` gives it.
        num_points: Length U of the orbit.

    Returns:
        Euclidean distance in units of the side of the torus.
    """
    theta = torch.arange(1, num_points + 1, dtype=torch.int64)
    miss = theta.unsqueeze(1) * torch.tensor(turn, dtype=torch.int64) % TURN
    miss = torch.minimum(miss, TURN - miss).double().square().sum(1).sqrt() / TURN
    late = theta > num_points // 4
    closest = miss.where(late, torch.inf).argsort()[:_NEIGHBOURS]
    least = math.sqrt(len(turn)) / 2  # a single point
    for index in closest.tolist():
        q = index + 1
        lattice = [(q * component + TURN // 2) // TURN for component in turn]
        least = min(least, float(miss[index]) + _covering_radius(lattice, q))
    return least


def _plastic(dimension: int) -> tuple[int, ...]:
    """Powers 1..K of the reciprocal of the root above 1 of x^(K+1) = x + 1, rounded down."""
    low, high = Fraction(1), Fraction(2)
    while high - low > Fraction(1, 1 << 72):
        middle = (low + high) / 2
        low, high = (middle, high) if middle ** (dimension + 1) < middle + 1 else (low, middle)
    return tuple(math.floor(TURN / low**power) for power in range(1, dimension + 1))


def _root_above(number: int, degree: int) -> int:
    root = max(1, round(number ** (1 / degree)) - 1)
    while root**degree < number:
        root += 1
    return root


def _widest_multiples(num_points: int, dimension: int) -> tuple[int, ...]:
    """The direction (1, g, g², ...) / U whose orbit has the longest shortest step, among some multipliers g."""
    theta = torch.arange(1, num_points // 2 + 2, dtype=torch.int64).unsqueeze(1)
    count = max(8, min(_CANDIDATES, _MOST_WORK // num_points, num_points))
    best, chosen = -1.0, (1,) * dimension
    for i in range(count):
        g = 1 + (2 * i + 1) * num_points // (2 * count)
        powers = tuple(pow(g, power, num_points) for power in range(dimension))
        step = theta * torch.tensor(powers) % num_points
        shortest = torch.minimum(step, num_points - step).square().sum(1)[: max(1, num_points // 2)].min().item()
        if shortest > best:
            best, chosen = float(shortest), powers
    return tuple(-(-power * TURN // num_points) % TURN for power in chosen)


def _covering_radius(lattice: list[int], q: int) -> float:
    """Bound on the covering radius of the lattice that `lattice / q` and the whole vectors generate."""
    dimension = len(lattice)
    rows = [lattice, *([q * (i == j) for j in range(dimension)] for i in range(dimension))]
    basis = torch.tensor(_reduced(_independent(rows)), dtype=torch.float64)
    return float(torch.linalg.qr(basis.T)[1].diagonal().norm()) / (2 * q)


def _independent(rows: list[list[int]]) -> list[list[int]]:
    """Basis of the lattice that integer rows of full rank generate, one more row than columns: Euclid by columns."""
    basis = []
    for column in range(len(rows[0])):
        while sum(row[column] != 0 for row in rows) > 1:
            pivot = min((row for row in rows if row[column]), key=lambda row: abs(row[column]))
            for row in rows:
                if row is not pivot:
                    times = row[column] // pivot[column]
                    row[:] = [x - times * y for x, y in zip(row, pivot, strict=True)]
        pivot = next(row for row in rows if row[column])
        basis.append(pivot)
        rows = [row for row in rows if row is not pivot]
    return basis


def _reduced(basis: list[list[int]]) -> list[list[int]]:
    """LLL reduction (Lenstra, Lenstra and Lovasz, 1982) with factor 3/4, for up to four vectors."""
    index = 1
    while index < len(basis):
        for other in range(index - 1, -1, -1):
            times = round(_orthogonal(basis)[1][index][other])
            basis[index] = [x - times * y for x, y in zip(basis[index], basis[other], strict=True)]
        lengths, factors = _orthogonal(basis)
        if lengths[index] >= (Fraction(3, 4) - factors[index][index - 1] ** 2) * lengths[index - 1]:
            index += 1
        else:
            basis[index - 1], basis[index] = basis[index], basis[index - 1]
            index = max(1, index - 1)
    return basis


def _orthogonal(basis: list[list[int]]) -> tuple[list[Fraction], list[list[Fraction]]]:
    """Squared lengths and factors of Gram-Schmidt."""
    rows: list[list[Fraction]] = []
    lengths: list[Fraction] = []
    factors: list[list[Fraction]] = []
    for vector in basis:
        rest, own = [Fraction(x) for x in vector], []
        for row, length in zip(rows, lengths, strict=True):
            factor = sum((x * y for x, y in zip(vector, row, strict=True)), Fraction(0)) / length
            own.append(factor)
            rest = [x - factor * y for x, y in zip(rest, row, strict=True)]
        rows.append(rest)
        lengths.append(sum((x * x for x in rest), Fraction(0)))
        factors.append(own)
    return lengths, factors
