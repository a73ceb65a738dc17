"""Rows of activations and the experts that a router sends them to."""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["rows_by_expert"]


def rows_by_expert(ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Every expert that has rows, and which these are in ascending order.

    On a GPU this waits for the device.

    Args:
        ids: `[rows]` integers; those outside `[0, experts)` belong to no expert.
        experts: Number of experts.

    Example:
        >>> [(expert, rows.tolist()) for expert, rows in rows_by_expert(torch.tensor([2, 0, 2, 5]), 4)]
        [(0, [1]), (2, [0, 2])]
    """
    order = ids.argsort(stable=True)
    borders = torch.arange(experts + 1, dtype=ids.dtype, device=ids.device)
    starts = torch.searchsorted(ids[order], borders).tolist()
    for expert in range(experts):
        if starts[expert] < starts[expert + 1]:
            yield expert, order[starts[expert] : starts[expert + 1]]
