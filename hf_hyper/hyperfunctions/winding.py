"""`winding`: the irrational winding of the torus, as in arXiv 2409.00592 with two weights to a point.

Two consecutive weights of a row are a point of the plane. T turns the torus by a fixed vector, the direction a, so the
orbit of the corner of a box of side l is `corner + l * frac(theta * a)` for theta = 0, 1, 2, ...; it fills the box, and
a point inside is stored as the theta that passes closest. The box is centred on the mean of all points. Points
outside it belong to one of M larger concentric boxes, the shells, filled by the same orbit on a larger scale:

    code = shell * (U + 1) + node       node 0: the centre;  node j >= 1: orbit point theta = j - 1
    pair = centre + shell_side[shell] * coordinate(node)

Shell 0 is the box itself. The orbit runs on integers, so every machine sees the same points: with a = A / 2^32,

    coordinate_i = ((theta * A_i) mod 2^32) / 2^32 - 1/2,   rounded once, to float32

Codes take `2 * bits` bits, packed row by row (`packing.py`), so a row decodes alone. Rotations are left out: the
method is data-free and takes weights as they are.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_hyper.errors import ConfigError
from hf_hyper.hyperfunctions.base import TensorSpec
from hf_hyper.packing import unpack, words_per_row
from hf_hyper.scheme import TILE, TensorScheme

__all__ = ["DIRECTIONS", "PAIR", "Winding", "WindingOptions", "code_width", "direction", "nodes"]

PAIR = 2
"""Weights that one code stands for."""

DIRECTIONS = ("hexagonal", "lattice", "plastic")

BOX_SIDE_UNIT = 1e-9
"""Unit in which a scheme records a fixed box side."""

MAX_WIDTH = 24
"""Bits of the longest code."""

_TURN = 1 << 32
_PLASTIC = (3242174889, 2447445413)  # floor(2^32 / rho), floor(2^32 / rho^2) with rho^3 = rho + 1


@dataclass(frozen=True)
class WindingOptions:
    """User options of `winding`.

    Attributes:
        num_points: Orbit points U in a box. None takes as many as fit the code width that `bits` gives; a number fixes
            U, and the code width follows from it (the paper's 1600 with 3 shells is 13 bits a pair, 6.5 a weight).
        num_shells: Shells M outside the box, at least 1. Each takes as many codes as the box; more shells suit heavier
            tails. At 4 to 8 bits 3 is best or close to it on trained weights.
        box_side: Side l of the box in units of the weights, as in the paper's code (0.1), resolved to 1e-9. None
            chooses it per tensor by least squared error, which is better on every tensor measured.
        direction: Slope of the winding. `hexagonal`: half-integer slope, the orbit is a nearly hexagonal lattice, least
            error; `lattice`: the integer slope ceil(sqrt(U)) of the released code, a sheared square grid; `plastic`:
            powers of the plastic number, irrational as in the paper's text, badly approximable.

    Raises:
        ConfigError: An option has a value that cannot be used.

    Source: arXiv 2409.00592 and its released code. Errors by direction: `hf_hyper.bench.winding`.
    """

    num_points: int | None = None
    num_shells: int = 3
    box_side: float | None = None
    direction: str = "hexagonal"

    def __post_init__(self) -> None:
        for name, value in (("num_points", self.num_points), ("num_shells", self.num_shells)):
            if value is None and name == "num_points":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << MAX_WIDTH:
                raise ConfigError(f"winding option {name} is {value!r}, wanted an integer from 1 to {2**MAX_WIDTH - 1}")
        side = self.box_side
        if side is not None and (
            isinstance(side, bool) or not isinstance(side, int | float) or not BOX_SIDE_UNIT <= side <= 1e9
        ):
            raise ConfigError(
                f"winding option box_side is {side!r}, wanted None or a number from {BOX_SIDE_UNIT} to 1e9; "
                "None chooses it per tensor"
            )
        if self.direction not in DIRECTIONS:
            raise ConfigError(
                f"winding option direction is {self.direction!r}, wanted one of {', '.join(map(repr, DIRECTIONS))}"
            )


def direction(name: str, num_points: int) -> tuple[int, int]:
    """The vector by which T turns the torus, in units of 2^-32 of a turn.

    `hexagonal` and `lattice` cross the box once in the first coordinate while the second goes up and wraps around
    every `slope` points. With slope q neighbouring columns are level and the cell is a square sheared by 1 / q; with
    q - 1/2 they are half a step apart, and at q * q = U * sqrt(3) / 2 three neighbours make an equilateral triangle,
    the best arrangement in the plane. Rounding up the second coordinate keeps a point that closes a column at the
    bottom of the box instead of letting it fall just short of the top.

    Args:
        name: One of `DIRECTIONS`.
        num_points: Length U of the orbit, at least 1.

    Returns:
        `(A_1, A_2)`, each in `[0, 2**32)`.
    """
    if name == "plastic":
        return _PLASTIC
    if name == "lattice":
        twice_slope = 2 * (1 + math.isqrt(num_points - 1))
    else:
        twice_slope = 2 * math.isqrt(math.isqrt(3 * num_points * num_points // 4)) + 1
    return _TURN // num_points % _TURN, -(-2 * _TURN // twice_slope) % _TURN


@functools.cache
def _nodes(num_points: int, turn: tuple[int, int], device: torch.device) -> Tensor:
    theta = torch.arange(num_points, dtype=torch.int64, device=device).unsqueeze(1)
    angle = theta * torch.tensor(turn, dtype=torch.int64, device=device) % _TURN
    orbit = (angle - _TURN // 2).float() / _TURN
    return torch.cat([orbit.new_zeros(1, PAIR), orbit])


def nodes(scheme: TensorScheme, device: torch.device) -> Tensor:
    """The points of the unit box: the centre, then the orbit. `[num_points + 1, 2]` float32 in [-0.5, 0.5]."""
    turn = (scheme.option("direction_0"), scheme.option("direction_1"))
    return _nodes(scheme.option("num_points"), turn, device)


def code_width(scheme: TensorScheme) -> int:
    """Bits of one code, which stands for `PAIR` weights.

    Raises:
        ConfigError: The rate is not one that `Winding.resolve` returns, or the codes do not fit it.
    """
    width = int(scheme.bits * PAIR)
    count = _count(scheme.option("num_shells"), scheme.option("num_points"))
    if width != scheme.bits * PAIR or not 1 <= width <= MAX_WIDTH or count > 1 << width:
        raise ConfigError(
            f"winding has {count} codes a pair, which {scheme.bits} bits a weight do not hold; take bits and options "
            "from resolve()"
        )
    return width


def _count(num_shells: int, num_points: int) -> int:
    return (num_shells + 1) * (num_points + 1)


def _stored_shape(scheme: TensorScheme) -> tuple[int, int]:
    if scheme.incoherence:
        return scheme.padded_out, scheme.padded_in
    return scheme.out_features, scheme.in_features


class Winding:
    """Member of the table of hyperfunctions; one number stands for two weights.

    Stored tensors, for a matrix of `rows` x `columns` (padded with incoherence) and `pairs = ceil(columns / 2)`:

    - `codes`: `[rows, words_per_row(pairs, 2 * bits)]` int32, every row packed on its own;
    - `centre`: `[2]` float32, mean of the first and of the second weights of the pairs;
    - `shell_side`: `[num_shells + 1]` float32, side of the box and of every shell.
    """

    name = "winding"
    incoherence = False

    def resolve(self, bits: float, options: Mapping[str, object]) -> tuple[float, tuple[tuple[str, int], ...]]:
        """Round `2 * bits` to whole bits a pair and complete the constants; `num_points`, when given, decides the rate.

        Args:
            bits: Requested code bits per weight.
            options: Fields of `WindingOptions`.

        Raises:
            ConfigError: Unknown option, or codes that do not fit.
        """
        known = {field.name for field in dataclasses.fields(WindingOptions)}
        if not known.issuperset(options):
            raise ConfigError(f"winding has no option {sorted(set(options) - known)}; choose among {sorted(known)}")
        given = WindingOptions(**dict(options))  # pyright: ignore[reportArgumentType]
        shells = given.num_shells
        if given.num_points is None:
            width = min(max(int(bits * PAIR + 0.5), 1), MAX_WIDTH)
            num_points = (1 << width) // (shells + 1) - 1
            if num_points < 1:
                least = (_count(shells, 1) - 1).bit_length() / PAIR
                raise ConfigError(
                    f"bits {bits} gives 2**{width} codes a pair, wanted at least {_count(shells, 1)} for num_shells "
                    f"{shells}; use bits >= {least} or num_shells <= {max((1 << width) // 2 - 1, 1)}"
                )
        else:
            num_points = given.num_points
            width = (_count(shells, num_points) - 1).bit_length()
            if width > MAX_WIDTH:
                raise ConfigError(
                    f"num_points {num_points} with num_shells {shells} needs {width} bits a pair, wanted at most "
                    f"{MAX_WIDTH}; use num_points <= {max((1 << MAX_WIDTH) // (shells + 1) - 1, 1)}"
                )
        turn = direction(given.direction, num_points)
        constants = {
            "box_side": 0 if given.box_side is None else round(given.box_side / BOX_SIDE_UNIT),
            "direction_0": turn[0],
            "direction_1": turn[1],
            "num_points": num_points,
            "num_shells": shells,
        }
        return width / PAIR, tuple(sorted(constants.items()))

    def tensors(self, scheme: TensorScheme) -> dict[str, TensorSpec]:
        """Shapes and dtypes of `codes`, `centre` and `shell_side`."""
        rows, columns = _stored_shape(scheme)
        words = words_per_row(-(-columns // PAIR), code_width(scheme))
        return {
            "codes": TensorSpec((rows, words), torch.int32),
            "centre": TensorSpec((PAIR,), torch.float32),
            "shell_side": TensorSpec((scheme.option("num_shells") + 1,), torch.float32),
        }

    def take(
        self, tensors: Mapping[str, Tensor], scheme: TensorScheme, tiles: Tensor
    ) -> tuple[dict[str, Tensor], TensorScheme]:
        """Rows of codes; see `base.Hyperfunction.take`."""
        rows = (tiles.unsqueeze(1) * TILE + torch.arange(TILE, device=tiles.device)).flatten()
        rows = rows.clamp(max=len(tensors["codes"]) - 1)
        part = dataclasses.replace(scheme, out_features=len(rows))
        return {**tensors, "codes": tensors["codes"][rows]}, part

    def decode(self, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
        """`centre + shell_side[shell] * coordinate(node)`; bit patterns that are no code decode in the last shell.

        Rows may be any subset of the stored ones.
        """
        columns = _stored_shape(scheme)[1]
        codes = unpack(tensors["codes"], code_width(scheme), -(-columns // PAIR))
        stride = scheme.option("num_points") + 1
        shell = (codes // stride).clamp(max=scheme.option("num_shells"))
        coordinate = nodes(scheme, codes.device)[codes % stride]  # [rows, pairs, 2]
        pair = tensors["centre"] + tensors["shell_side"][shell].unsqueeze(-1) * coordinate
        return pair.flatten(-2)[..., :columns]
