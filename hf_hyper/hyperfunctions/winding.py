"""`winding`: the irrational winding of the torus, as in arXiv 2409.00592, with K weights to a point, K = 2 unless said.

K consecutive weights of a row are a point of K-dimensional space. T turns the torus by a fixed vector, the direction a,
so the orbit of the corner of a box of side l is `corner + l * frac(theta * a)` for theta = 0, 1, 2, ...; it fills the
box, and a point inside is stored as the theta that passes closest. The box is centred on the mean of all points. Points
outside it belong to one of M larger concentric boxes, the shells, filled by the same orbit on a larger scale:

    code = shell * (U + 1) + node       node 0: the centre;  node j >= 1: orbit point theta = j - 1
    point = centre + shell_side[shell] * coordinate(node)

Shell 0 is the box itself. The orbit runs on integers, so every machine sees the same points: with a = A / 2^32,

    coordinate_i = ((theta * A_i) mod 2^32) / 2^32 - 1/2,   rounded once, to float32

Codes take `K * bits` bits, packed row by row (`packing.py`), so a row decodes alone. The method is data-free and takes
weights as they are; rotations and group scales, which it does not have, are options.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_hyper.errors import ConfigError
from hf_hyper.hyperfunctions.base import TensorSpec
from hf_hyper.hyperfunctions.directions import TURN, direction
from hf_hyper.packing import unpack, words_per_row
from hf_hyper.scheme import TILE, TensorScheme

__all__ = ["DIRECTIONS", "Winding", "WindingOptions", "code_width", "dimension", "nodes"]

DIRECTIONS = ("hexagonal", "lattice", "plastic", "golden", "primes")

MAX_DIMENSION = 4
"""Most weights that one code stands for."""

BOX_SIDE_UNIT = 1e-9
"""Unit in which a scheme records a fixed box side."""

MAX_WIDTH = 24
"""Bits of the longest code."""

GROUP_SCALE = "group_scale"


@dataclass(frozen=True)
class WindingOptions:
    """User options of `winding`.

    Attributes:
        num_points: Orbit points U in a box. None takes as many as fit the code width that `bits` gives; a number fixes
            U, and the code width follows from it (the paper's 1600 with 3 shells is 13 bits a pair, 6.5 a weight).
        num_shells: Shells M outside the box, at least 1. Each takes as many codes as the box; more shells suit heavier
            tails. At 4 to 8 bits 3 is best or close to it on trained weights.
        dimension: Weights K that one code stands for, 1 to 4; 2 in the paper's experiments. More fill space better and
            take longer to find: see `hf_hyper.bench.ablation`.
        box_side: Side l of the box in units of the weights, as in the paper's code (0.1), resolved to 1e-9. None
            chooses it per tensor by least squared error, which is better on every tensor measured.
        direction: Slope of the winding, see `directions.py`. `hexagonal`: least error; `lattice`: the integer slope of
            the released code; `plastic`, `golden`, `primes`: irrational, as in the paper's text.
        loss_max: Largest mean absolute error of a tensor, in units of the weights. Every tensor then takes the fewest
            points that keep it, `bits` being the most; a tensor that needs more stays as it is. None gives all `bits`.
        incoherence: Rotate weights before encoding, as `shift` does. Not part of the method.
        group_size: Consecutive weights of a row that share a 16-bit scale. Not part of the method; None for none.

    Raises:
        ConfigError: An option has a value that cannot be used.

    Source: arXiv 2409.00592 and its released code. Errors by direction: `hf_hyper.bench.winding`.
    """

    num_points: int | None = None
    num_shells: int = 3
    box_side: float | None = None
    direction: str = "hexagonal"
    dimension: int = 2
    loss_max: float | None = None
    incoherence: bool = False
    group_size: int | None = None

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
        if self.dimension not in range(1, MAX_DIMENSION + 1):
            raise ConfigError(f"winding option dimension is {self.dimension!r}, wanted 1, 2, 3 or 4")
        loss, group = self.loss_max, self.group_size
        if loss is not None and (isinstance(loss, bool) or not isinstance(loss, int | float) or not loss > 0):
            raise ConfigError(f"winding option loss_max is {loss!r}, wanted None or a positive mean absolute error")
        if not isinstance(self.incoherence, bool):
            raise ConfigError(f"winding option incoherence is {self.incoherence!r}, wanted True or False")
        if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 8):
            raise ConfigError(f"winding option group_size is {group!r}, wanted None or an integer from 8")
        if self.direction not in DIRECTIONS:
            raise ConfigError(
                f"winding option direction is {self.direction!r}, wanted one of {', '.join(map(repr, DIRECTIONS))}"
            )


@functools.cache
def _nodes(num_points: int, turn: tuple[int, ...], device: torch.device) -> Tensor:
    theta = torch.arange(num_points, dtype=torch.int64, device=device).unsqueeze(1)
    angle = theta * torch.tensor(turn, dtype=torch.int64, device=device) % TURN
    orbit = (angle - TURN // 2).float() / TURN
    return torch.cat([orbit.new_zeros(1, len(turn)), orbit])


def nodes(scheme: TensorScheme, device: torch.device) -> Tensor:
    """The points of the unit box: the centre, then the orbit. `[num_points + 1, K]` float32 in [-0.5, 0.5]."""
    turn = tuple(scheme.option(f"direction_{axis}") for axis in range(dimension(scheme)))
    return _nodes(scheme.option("num_points"), turn, device)


def dimension(scheme: TensorScheme) -> int:
    """Weights K that one code stands for."""
    return dict(scheme.options).get("dimension", 2)


def group_size(scheme: TensorScheme) -> int:
    """Weights of a row that share a scale, 0 where there are no scales."""
    return dict(scheme.options).get("group_size", 0)


def code_width(scheme: TensorScheme) -> int:
    """Bits of one code, which stands for `dimension` weights.

    Raises:
        ConfigError: The rate is not one that `Winding.resolve` returns, or the codes do not fit it.
    """
    width = round(scheme.bits * dimension(scheme))
    count = _count(scheme.option("num_shells"), scheme.option("num_points"))
    if abs(width - scheme.bits * dimension(scheme)) > 1e-6 or not 1 <= width <= MAX_WIDTH or count > 1 << width:
        raise ConfigError(
            f"winding has {count} codes of {dimension(scheme)} weights, which {scheme.bits} bits a weight do not hold; "
            "take bits and options from resolve()"
        )
    return width


def _count(num_shells: int, num_points: int) -> int:
    return (num_shells + 1) * (num_points + 1)


def _stored_shape(scheme: TensorScheme) -> tuple[int, int]:
    if scheme.incoherence:
        return scheme.padded_out, scheme.padded_in
    return scheme.out_features, scheme.in_features


class Winding:
    """Member of the table of hyperfunctions; one number stands for K weights.

    Stored tensors, for a matrix of `rows` x `columns` (padded with incoherence) and `points = ceil(columns / K)`:

    - `codes`: `[rows, words_per_row(points, K * bits)]` int32, every row packed on its own;
    - `centre`: `[K]` float32, mean of the first, the second, ... weights of the points;
    - `shell_side`: `[num_shells + 1]` float32, side of the box and of every shell;
    - `group_scale`, with groups: `[rows, ceil(columns / group_size)]` float16.
    """

    name = "winding"
    incoherence = False

    def resolve(self, bits: float, options: Mapping[str, object]) -> tuple[float, tuple[tuple[str, int], ...]]:
        """Round `K * bits` to whole bits a code and complete the constants; `num_points`, when given, decides the rate.

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
        shells, together = given.num_shells, given.dimension
        if given.num_points is None:
            width = min(max(int(bits * together + 0.5), 1), MAX_WIDTH)
            num_points = (1 << width) // (shells + 1) - 1
            if num_points < 1:
                least = (_count(shells, 1) - 1).bit_length() / together
                raise ConfigError(
                    f"bits {bits} gives 2**{width} codes of {together} weights, wanted at least {_count(shells, 1)} "
                    f"for num_shells {shells}; use bits >= {least} or num_shells <= {max((1 << width) // 2 - 1, 1)}"
                )
        else:
            num_points = given.num_points
            width = (_count(shells, num_points) - 1).bit_length()
            if width > MAX_WIDTH:
                raise ConfigError(
                    f"num_points {num_points} with num_shells {shells} needs codes of {width} bits, wanted at most "
                    f"{MAX_WIDTH}; use num_points <= {max((1 << MAX_WIDTH) // (shells + 1) - 1, 1)}"
                )
        turn = direction(given.direction, num_points, together)
        constants = {
            "box_side": 0 if given.box_side is None else round(given.box_side / BOX_SIDE_UNIT),
            "num_points": num_points,
            "num_shells": shells,
            **{f"direction_{axis}": component for axis, component in enumerate(turn)},
        }
        if together != 2:
            constants["dimension"] = together
        if given.group_size is not None:
            constants["group_size"] = given.group_size
        return width / together, tuple(sorted(constants.items()))

    def tensors(self, scheme: TensorScheme) -> dict[str, TensorSpec]:
        """Shapes and dtypes of `codes`, `centre` and `shell_side`."""
        rows, columns = _stored_shape(scheme)
        words = words_per_row(-(-columns // dimension(scheme)), code_width(scheme))
        specs = {
            "codes": TensorSpec((rows, words), torch.int32),
            "centre": TensorSpec((dimension(scheme),), torch.float32),
            "shell_side": TensorSpec((scheme.option("num_shells") + 1,), torch.float32),
        }
        if group_size(scheme):
            specs[GROUP_SCALE] = TensorSpec((rows, -(-columns // group_size(scheme))), torch.float16)
        return specs

    def take(
        self, tensors: Mapping[str, Tensor], scheme: TensorScheme, tiles: Tensor
    ) -> tuple[dict[str, Tensor], TensorScheme]:
        """Rows of codes; see `base.Hyperfunction.take`."""
        rows = (tiles.unsqueeze(1) * TILE + torch.arange(TILE, device=tiles.device)).flatten()
        rows = rows.clamp(max=len(tensors["codes"]) - 1)
        part = dataclasses.replace(scheme, out_features=len(rows))
        rowwise = [name for name in ("codes", GROUP_SCALE) if name in tensors]
        return {**tensors, **{name: tensors[name][rows] for name in rowwise}}, part

    def decode(self, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
        """`centre + shell_side[shell] * coordinate(node)`; bit patterns that are no code decode in the last shell.

        Rows may be any subset of the stored ones.
        """
        columns = _stored_shape(scheme)[1]
        codes = unpack(tensors["codes"], code_width(scheme), -(-columns // dimension(scheme)))
        stride = scheme.option("num_points") + 1
        shell = (codes // stride).clamp(max=scheme.option("num_shells"))
        coordinate = nodes(scheme, codes.device)[codes % stride]  # [rows, points, K]
        point = tensors["centre"] + tensors["shell_side"][shell].unsqueeze(-1) * coordinate
        weight = point.flatten(-2)[..., :columns]
        if group_size(scheme):
            scale = tensors[GROUP_SCALE].float().repeat_interleave(group_size(scheme), -1)
            weight = weight * scale[..., :columns]
        return weight
