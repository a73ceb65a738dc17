"""The nearest of many nodes in any dimension, in plain torch.

Points are halved along the longest side of the box around them, again and again. On the way down a box keeps only the
nodes that can be nearest to a point in it: a node whose least distance to the box is more than the greatest distance of
another one is dropped. What is left is compared directly, so the result is that of comparing with every node.
"""

import torch
from torch import Tensor

__all__ = ["nearest_brute_force", "nearest_by_halving"]

_LEAST_POINTS = 8
"""Points that are not halved any further."""

_LEAST_WORK = 1 << 15
"""Pairs of point and node that are compared directly."""


def nearest_by_halving(points: Tensor, nodes: Tensor) -> Tensor:
    """Same as `nearest_brute_force`; see the module.

    Args:
        points: `[n, K]` float32, magnitudes up to 1e18.
        nodes: `[m, K]` float32 on the same device.

    Returns:
        `[n]` int32 in `[0, m)`.
    """
    found = points.new_empty(len(points), dtype=torch.int32)
    exact = nodes.double()
    boxes = [(torch.arange(len(points), device=points.device), torch.arange(len(nodes), device=points.device))]
    while boxes:
        inside, rivals = boxes.pop()
        if len(inside) == 0:
            continue
        part = points[inside]
        low, high = part.amin(0).double(), part.amax(0).double()
        rivals = _possible(exact, rivals, low, high)
        axis = int((high - low).argmax())
        left = _lower_half(part[:, axis])
        small = len(inside) <= _LEAST_POINTS or len(inside) * len(rivals) <= _LEAST_WORK
        if small or len(rivals) == 1 or bool(left.all()) or not bool(left.any()):
            found[inside] = rivals[nearest_brute_force(part, nodes[rivals]).long()].int()
        else:
            boxes += [(inside[left], rivals), (inside[~left], rivals)]
    return found


def nearest_brute_force(points: Tensor, nodes: Tensor, *, chunk: int = 1 << 22) -> Tensor:
    """Reference: least sum of squared differences in float32, the lowest index on a tie.

    Args:
        points: `[n, K]` float32.
        nodes: `[m, K]` float32.
        chunk: Distances held at a time.

    Returns:
        `[n]` int32 in `[0, m)`.
    """
    rows = max(1, chunk // len(nodes))
    found = []
    for block in points.split(rows):
        squares = [(block[:, axis, None] - nodes[:, axis]).square() for axis in range(points.shape[1])]
        found.append(sum(squares[1:], squares[0]).argmin(1).int())
    return torch.cat(found) if found else points.new_empty(0, dtype=torch.int32)


def _possible(nodes: Tensor, rivals: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Those of `rivals`, in order, that can be nearest to a point of a box, with room for float32 rounding."""
    offset = (nodes[rivals] - (low + high) / 2).abs()
    half = (high - low) / 2
    least = (offset - half).clamp(min=0).square().sum(1)
    most = (offset + half).square().sum(1).min()
    return rivals[least <= most * (1 + 1e-5) + 1e-30]


def _lower_half(values: Tensor) -> Tensor:
    """The half with the smaller values; all of them only where all are equal."""
    middle = values.median()
    return values <= middle if bool((values > middle).any()) else values < middle
