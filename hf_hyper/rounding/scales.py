"""Row scales in the metric of the second moments.

Once the orbits are chosen, the scales that do the least damage are the solution of a linear system; nothing else about
the codes changes.
"""

import torch
from torch import Tensor

__all__ = ["fit_scales"]

RIDGE = 1e-4


def fit_scales(weight: Tensor, values: Tensor, inputs: Tensor, outputs: Tensor | None = None) -> Tensor:
    """Scales s that minimise tr(O (W - diag(s) V) I (W - diag(s) V)^T).

    Args:
        weight: W, `[rows, columns]`.
        values: V, `[rows, columns]`, what the codes stand for before scaling.
        inputs: I, `[columns, columns]` positive semidefinite.
        outputs: O, `[rows, rows]`, or None for the identity: every row by itself.

    Returns:
        `[rows]`; zero for rows of V that are zero.
    """
    moved = values @ inputs
    if outputs is None:
        energy = (moved * values).sum(1)
        return torch.where(energy > 0, (moved * weight).sum(1) / energy, 0.0)
    system = outputs * (moved @ values.T)
    system.diagonal().add_(RIDGE * system.diagonal().mean() + torch.finfo(system.dtype).tiny)
    return torch.linalg.solve(system, (outputs * (moved @ weight.T)).sum(1))
