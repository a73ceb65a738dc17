"""Encoder of `winding`: choose the box and the shells, then find the nearest code of every pair of weights.

The search is exact: the index is the one that a comparison with every node in float32 gives, lowest on a tie. The
compiled core finds it through a tree of grids; `nearest_brute_force` compares with all of them and is the reference,
and the only path where there is no core.

Efforts never change the format. `fast` is the rule of the released code of arXiv 2409.00592: equally spaced shells,
the shell of a pair follows from its distance to the centre, the node is the nearest one in that shell. `balanced` and
`best` take the nearest among all codes of all shells, and let the shells grow geometrically, which leaves a third less
error on Gaussian weights and 40 to 45 % less on trained ones (`hf_hyper.bench.winding`).
"""

import torch
from torch import Tensor

from hf_hyper import _native
from hf_hyper.hyperfunctions.winding import BOX_SIDE_UNIT, PAIR, code_width, nodes
from hf_hyper.packing import pack
from hf_hyper.scheme import TensorScheme

__all__ = ["assign", "encode_winding", "nearest", "nearest_brute_force", "shells"]

_CANDIDATES = {"fast": 16, "balanced": 12, "best": 32}
"""Box sides tried per tensor."""

_SAMPLE = {"fast": 1 << 13, "balanced": 1 << 13, "best": 1 << 15}
"""Pairs on which they are tried."""

_BLOCK = 1 << 20
"""Pairs encoded at a time; bounds the memory beside the weight."""

_GOLDEN = 2654435769  # 2^32 over the golden ratio: multiples of it visit the circle evenly

_SMALLEST = 2.0**-149  # least positive float32
_LARGEST = float(torch.finfo(torch.float32).max)


def encode_winding(weight: Tensor, scheme: TensorScheme, effort: str) -> dict[str, Tensor]:
    """Tensors of `hyperfunctions.winding.Winding` for one weight matrix; see `encoders.encode`."""
    centre = _mean(weight)
    blocks = weight.split(max(1, 2 * _BLOCK // weight.shape[1]))
    farthest = max(float(_length(points).max()) for block in blocks for points in [_points(block, centre)])
    sample = _points(_spread(weight, _SAMPLE[effort]), centre)
    shell_side = shells(sample, farthest, centre, scheme, effort)
    words = []
    for block in blocks:
        codes = assign(_points(block, centre), shell_side, scheme, effort)
        words.append(pack(codes.view(len(block), -1), code_width(scheme)))
    return {"codes": torch.cat(words), "centre": centre, "shell_side": shell_side}


def assign(points: Tensor, shell_side: Tensor, scheme: TensorScheme, effort: str) -> Tensor:
    """Code of every point.

    Args:
        points: `[n, 2]` float64, pairs of weights less the centre.
        shell_side: `[num_shells + 1]` float32, side of the box and of the shells, positive and not falling.
        scheme: Gives the nodes.
        effort: `fast` or another one; see the module.

    Returns:
        `[n]` int64 in `[0, (num_shells + 1) * (num_points + 1))`, on the device of `points`.
    """
    unit = nodes(scheme, points.device)
    sides = shell_side.double()
    if effort != "fast":
        relative = (sides / sides[-1]).float().view(-1, 1, 1)
        return nearest((points / sides[-1]).float(), (relative * unit).flatten(0, 1)).long()
    outside = points.abs().amax(1) > sides[0] / 2
    shell = torch.searchsorted(sides[1:] / 2, _length(points)).clamp(max=len(sides) - 2) + 1
    shell = torch.where(outside, shell, 0)
    return shell * len(unit) + nearest((points / sides[shell].unsqueeze(1)).float(), unit)


def shells(sample: Tensor, farthest: float, centre: Tensor, scheme: TensorScheme, effort: str) -> Tensor:
    """Sides of the box and the shells with the least squared error on a sample.

    Shell m reaches to the distance `l/2 + m * (farthest - l/2) / M` with effort `fast`, else to
    `l/2 * (2 * farthest / l)^(m/M)`, so the last one holds every point. The box side l is the scheme's, or the best one
    of a geometric series.

    Args:
        sample: `[n, 2]` float64, some pairs of weights less the centre.
        farthest: Largest distance of any pair from the centre.
        centre: `[2]` float32.
        scheme: Gives the nodes, the number of shells and a fixed box side, if any.
        effort: Chooses the number of candidates and the spacing of the shells.

    Returns:
        `[num_shells + 1]` float32, such that no code decodes to an infinite weight.
    """
    fixed = scheme.option("box_side") * BOX_SIDE_UNIT
    deviation = float(sample.square().mean().sqrt())
    if fixed:
        sides = [fixed]
    elif deviation == 0.0:
        sides = [max(2 * farthest, _SMALLEST)]
    else:
        count = _CANDIDATES[effort]
        sides = [deviation * (2 * farthest / deviation) ** (i / (count - 1)) for i in range(count)]
    room = 2 * (_LARGEST - float(centre.abs().max())) * (1 - 2**-20)
    step = torch.arange(scheme.option("num_shells") + 1, dtype=torch.float64) / scheme.option("num_shells")
    least, best = float("inf"), torch.empty(0)
    for side in sides:
        reach = max(2 * farthest, side)
        spacing = side + step * (reach - side) if effort == "fast" else side * (reach / side) ** step
        candidate = spacing.clamp(_SMALLEST, room).float().to(sample.device)
        error = _error(sample, candidate, scheme, effort)
        if error < least:
            least, best = error, candidate
    return best


def nearest(points: Tensor, nodes: Tensor) -> Tensor:
    """Index of the node closest to every point, the same as `nearest_brute_force` gives.

    Args:
        points: `[n, 2]` float32, magnitudes up to 1e18.
        nodes: `[m, 2]` float32 on the same device.

    Returns:
        `[n]` int32 in `[0, m)`. The same for any number of threads and on any machine.

    Example:
        >>> nearest(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        tensor([1], dtype=torch.int32)
    """
    if points.device.type == "cpu":
        if _native.load() is not None:
            return _native.winding_nearest(points, nodes)
        _native.say_if_absent()
    return nearest_brute_force(points, nodes)


def nearest_brute_force(points: Tensor, nodes: Tensor, *, chunk: int = 1 << 22) -> Tensor:
    """Reference of `nearest`: least `dx * dx + dy * dy` in float32, the lowest index on a tie.

    Args:
        points: `[n, 2]` float32.
        nodes: `[m, 2]` float32.
        chunk: Distances held at a time.

    Returns:
        `[n]` int32 in `[0, m)`.
    """
    rows = max(1, chunk // len(nodes))
    found = []
    for block in points.split(rows):
        dx, dy = (block[:, axis, None] - nodes[:, axis] for axis in range(PAIR))
        found.append((dx * dx + dy * dy).argmin(1).int())
    return torch.cat(found) if found else points.new_empty(0, dtype=torch.int32)


def _error(sample: Tensor, shell_side: Tensor, scheme: TensorScheme, effort: str) -> float:
    """Sum of squared errors on the sample."""
    code = assign(sample, shell_side, scheme, effort)
    unit = nodes(scheme, sample.device)
    decoded = shell_side.double()[code // len(unit)].unsqueeze(1) * unit[code % len(unit)]
    return float((sample - decoded).square().sum())


def _length(points: Tensor) -> Tensor:
    return torch.hypot(points[:, 0], points[:, 1])


def _mean(weight: Tensor) -> Tensor:
    """Mean of the first and of the second weights of the pairs: `[2]` float32."""
    first = weight[:, 0::PAIR].mean(dtype=torch.float64)
    second = weight[:, 1::PAIR].mean(dtype=torch.float64) if weight.shape[1] > 1 else first
    return torch.stack([first, second]).float()


def _points(weight: Tensor, centre: Tensor) -> Tensor:
    """Pairs of consecutive weights less the centre, which also fills up odd rows: `[rows * pairs, 2]` float64."""
    pairs = weight.double()
    if weight.shape[1] % PAIR:
        pairs = torch.cat([pairs, centre[1].double().expand(len(weight), 1)], 1)
    return pairs.reshape(-1, PAIR) - centre.double()


def _spread(weight: Tensor, pairs: int) -> Tensor:
    """At most `pairs` pairs of weights, spread over all rows and columns and the same every time: `[n, 1 or 2]`."""
    per_row = max(1, weight.shape[1] // PAIR)
    count = len(weight) * per_row
    turn = torch.arange(min(pairs, count), device=weight.device) * _GOLDEN & 0xFFFFFFFF
    place = turn * count >> 32
    columns = torch.arange(min(PAIR, weight.shape[1]), device=weight.device)
    return weight[place.unsqueeze(1) // per_row, place.unsqueeze(1) % per_row * PAIR + columns]
