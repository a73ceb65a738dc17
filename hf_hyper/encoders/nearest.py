"""Encoder of `winding`: choose the box and the shells, then find the nearest code of every point, K weights.

The search is exact: the index is the one that a comparison with every node in float32 gives, lowest on a tie. The
compiled core finds it through a tree of grids for K = 2; `halving.py` for other K and where there is no core;
`halving.nearest_brute_force` compares with all of them and is the reference.

Efforts never change the format. `fast` is the rule of the released code of arXiv 2409.00592: equally spaced shells,
the shell of a pair follows from its distance to the centre, the node is the nearest one in that shell. `balanced` and
`best` take the nearest among all codes of all shells, and let the shells grow geometrically, which leaves a third less
error on Gaussian weights and 40 to 45 % less on trained ones (`hf_hyper.bench.winding`).
"""

import torch
from torch import Tensor

from hf_hyper import _native
from hf_hyper.encoders.halving import nearest_by_halving
from hf_hyper.hyperfunctions.winding import BOX_SIDE_UNIT, GROUP_SCALE, code_width, dimension, group_size, nodes
from hf_hyper.packing import pack
from hf_hyper.scheme import TensorScheme

__all__ = ["assign", "encode_winding", "nearest", "shells"]

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
    scales = {}
    if group_size(scheme):
        weight, scales[GROUP_SCALE] = _grouped(weight, group_size(scheme))
    together = dimension(scheme)
    centre = _mean(weight, together)
    blocks = weight.split(max(1, 2 * _BLOCK // weight.shape[1]))
    farthest = max(float(_length(points).max()) for block in blocks for points in [_points(block, centre)])
    sample = _points(_spread(weight, _SAMPLE[effort], together), centre)
    shell_side = shells(sample, farthest, centre, scheme, effort)
    words = []
    for block in blocks:
        codes = assign(_points(block, centre), shell_side, scheme, effort)
        words.append(pack(codes.view(len(block), -1), code_width(scheme)))
    return {"codes": torch.cat(words), "centre": centre, "shell_side": shell_side, **scales}


def assign(points: Tensor, shell_side: Tensor, scheme: TensorScheme, effort: str) -> Tensor:
    """Code of every point.

    Args:
        points: `[n, K]` float64, K weights each less the centre.
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
        sample: `[n, K]` float64, some points less the centre.
        farthest: Largest distance of any point from the centre.
        centre: `[K]` float32.
        scheme: Gives the nodes, the number of shells and a fixed box side, if any.
        effort: Chooses the number of candidates and the spacing of the shells.

    Returns:
        `[num_shells + 1]` float32, such that no code decodes to an infinite weight.
    """
    fixed = scheme.option("box_side") * BOX_SIDE_UNIT
    deviation = float((sample.square().sum(1).sum() / max(1, sample.numel())).sqrt())
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
    """Index of the node closest to every point, the same as `halving.nearest_brute_force` gives.

    Args:
        points: `[n, K]` float32, magnitudes up to 1e18.
        nodes: `[m, K]` float32 on the same device.

    Returns:
        `[n]` int32 in `[0, m)`. The same for any number of threads and on any machine.

    Example:
        >>> nearest(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        tensor([1], dtype=torch.int32)
    """
    if points.shape[1] == 2:
        if _native.load() is not None:  # for points of a GPU too: halving asks it some times for every box
            return _native.winding_nearest(points.cpu(), nodes.cpu()).to(points.device)
        _native.say_if_absent()
    return nearest_by_halving(points, nodes)


def _error(sample: Tensor, shell_side: Tensor, scheme: TensorScheme, effort: str) -> float:
    """Sum of squared errors on the sample."""
    code = assign(sample, shell_side, scheme, effort)
    unit = nodes(scheme, sample.device)
    decoded = shell_side.double()[code // len(unit)].unsqueeze(1) * unit[code % len(unit)]
    return float((sample - decoded).square().sum(1).sum())


def _length(points: Tensor) -> Tensor:
    return torch.linalg.vector_norm(points, dim=1)


def _mean(weight: Tensor, together: int) -> Tensor:
    """Mean of the first, the second, ... weights of the points: `[K]` float32; of all weights where a row has fewer."""
    parts = [weight[:, axis::together] for axis in range(together)]
    # Row by row: a sum of everything would depend on the number of threads.
    parts = [part if part.numel() else weight for part in parts]
    return torch.stack([part.sum(1, dtype=torch.float64).sum() / part.numel() for part in parts]).float()


def _points(weight: Tensor, centre: Tensor) -> Tensor:
    """K consecutive weights less the centre, which also fills up the end of rows: `[rows * points, K]` float64."""
    together, columns = len(centre), weight.shape[1]
    points = weight.double()
    if columns % together:
        rest = centre[columns % together :].double()
        points = torch.cat([points, rest.expand(len(weight), -1)], 1)
    return points.reshape(-1, together) - centre.double()


def _spread(weight: Tensor, points: int, together: int) -> Tensor:
    """At most `points` points, spread over all rows and columns and the same every time: `[n, K or fewer]`."""
    per_row = max(1, weight.shape[1] // together)
    count = len(weight) * per_row
    turn = torch.arange(min(points, count), device=weight.device) * _GOLDEN & 0xFFFFFFFF
    place = turn * count >> 32
    columns = torch.arange(min(together, weight.shape[1]), device=weight.device)
    return weight[place.unsqueeze(1) // per_row, place.unsqueeze(1) % per_row * together + columns]


def _grouped(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Weights over the root mean square of their group, and that as `[rows, groups]` float16, 1 for zeros."""
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
    scale = groups.square().mean(2).sqrt().clamp(max=torch.finfo(torch.float16).max).half()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (groups / scale.float().unsqueeze(2)).flatten(1)[:, : weight.shape[1]], scale
