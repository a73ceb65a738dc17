"""Second moments: what calibration knows of a layer.

The damage that an error E of a weight matrix does is close to tr(O E I E^T), where I = E[x x^T] is the second moment of
the layer's inputs, perhaps weighed by token, and O = E[g g^T] that of the loss gradients at its outputs (the Kronecker
approximation of the Fisher information). Both are kept in two halves of the calibration text: how strongly a moment
should be trusted is what one half says about the other (`trust`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_hyper.errors import ShapeError

__all__ = ["Moment", "block_factor", "both_sides", "regularized", "trust"]

CANDIDATES = tuple(10.0 ** (exponent / 2) for exponent in range(-6, 5))
"""Strengths of the identity that `trust` chooses among, in units of the mean of the diagonal."""

START = 0.1
"""Strength at which `trust` begins."""

PANEL = 256
"""Rows of a moment that are summed together; what lies left of the diagonal panel is the mirror of the rest."""

WIDTH = 1024
"""Coordinates that `trust` looks at; after a rotation the first ones are as good a sample as any."""


class Moment:
    """Running mean of v v^T over rows v, in two halves.

    Args:
        width: Length of a row.
        device: Where it is kept, in float32.

    Attributes:
        counts: Rows seen by each half.
        derived: What users of the finished moment computed from it and want to find again.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.counts = [0, 0]
        self.derived: dict[Any, tuple[Tensor, Tensor]] = {}
        self._upper = torch.zeros(2, width, width, device=device)  # panels from the diagonal to the right

    def add(self, rows: Tensor, half: int) -> None:
        """Count rows `[..., width]` of any floating dtype into half 0 or 1.

        Raises:
            ShapeError: The rows have another width, or hold NaN or infinity.
        """
        if rows.shape[-1] != self.width:
            raise ShapeError(f"rows of width {rows.shape[-1]} for a second moment of width {self.width}")
        rows = rows.reshape(-1, self.width).float()
        for start in range(0, self.width, PANEL):
            own = rows[:, start : start + PANEL]
            self._upper[half, start : start + PANEL, start:].addmm_(own.T, rows[:, start:])
        self._count(len(rows), half)

    def add_product(self, product: Tensor, count: int, half: int) -> None:
        """Count `count` rows by the sum `[width, width]` of their outer products."""
        self._upper[half] += product
        self._count(count, half)

    def _count(self, count: int, half: int) -> None:
        if not bool(self._upper[half].diagonal().isfinite().all()):
            raise ShapeError(
                "activations or gradients of the calibration text are NaN or infinite; load the model in float32 or "
                "bfloat16, or give another text"
            )
        self.counts[half] += count

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Mean of each half, `[width, width]` float32; zero where a half has seen nothing."""
        first, second = (
            _symmetric(total) / max(count, 1) for total, count in zip(self._upper, self.counts, strict=True)
        )
        return first, second

    def mean(self) -> Tensor:
        """Mean over both halves, `[width, width]` float32."""
        return _symmetric(self._upper.sum(0)) / max(sum(self.counts), 1)


def regularized(moment: Tensor, strength: float) -> Tensor:
    """`moment` in units of its mean diagonal plus `strength` times the identity; the identity where it is zero."""
    level = moment.diagonal().mean()
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    if not level > 0:
        return identity
    return (moment + moment.T) / (2 * level) + strength * identity


def trust(halves: tuple[Tensor, Tensor], block: int) -> float:
    """Strength of the identity with which one half of a text serves the other best.

    With the factor L of a regularized moment (`block_factor`), feedback rounding turns white rounding noise n into the
    error n L^-1. Its damage on text that the factor has not seen is tr(L^-1 M L^-T) with that text's moment M. Both
    directions are tried. The moment that is used in the end has seen twice as much and would bear less, but it is also
    only a model of the damage; halving the strength measured worse (`NOTES.md`).

    Args:
        halves: Two `[n, n]` moments of different text.
        block: Width of the blocks that are rounded together; it divides n.

    Returns:
        One of `CANDIDATES`; the largest where a half is empty.
    """
    first, second = (half[:WIDTH, :WIDTH] for half in halves)
    if not (first.diagonal().sum() > 0 and second.diagonal().sum() > 0):
        return CANDIDATES[-1]

    roots = [_root(regularized(half, 0.0)) for half in (first, second)]

    @functools.cache
    def damage(candidate: int) -> float:
        strength = CANDIDATES[candidate]
        return _damage(first, roots[1], strength, block) + _damage(second, roots[0], strength, block)

    best = CANDIDATES.index(START)
    for step in (1, -1):  # the damage falls to one minimum and rises
        while 0 <= best + step < len(CANDIDATES) and damage(best + step) < damage(best):
            best += step
    return CANDIDATES[best]


def block_factor(moment: Tensor, block: int) -> Tensor:
    """Unit block-lower-triangular L of the factorization M = L D L^T with `block`-wide diagonal blocks D.

    Args:
        moment: `[n, n]` symmetric, n a multiple of `block`. If it is not positive definite in float32, just enough of
            the identity is added.

    Returns:
        `[n, n]`, identity blocks on the diagonal.
    """
    n, root = len(moment), _root(moment)
    panels = root.view(n, n // block, block).transpose(0, 1)  # [n / block, n, block]
    diagonal = torch.stack([panels[i, i * block : (i + 1) * block] for i in range(n // block)])
    unit = torch.linalg.solve_triangular(diagonal, panels, upper=False, left=False)
    return unit.transpose(0, 1).reshape(n, n)


def both_sides(matrix: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
    """R M R^T for a moment M `[n, n]` and a rotation R of rows `[..., n]` to `[..., m]`: `[m, m]`."""
    return rotate(rotate(matrix).T.contiguous())


def _root(moment: Tensor) -> Tensor:
    """Cholesky factor of a moment, with just enough of the identity added where it has none."""
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    level, strength = moment.diagonal().mean(), 0.0
    while True:
        root, failed = torch.linalg.cholesky_ex(moment + strength * level * identity)
        if not failed:
            return root
        strength = max(1e-6, 4 * strength)


def _symmetric(upper: Tensor) -> Tensor:
    """A symmetric matrix from its upper triangle."""
    return upper.triu() + upper.triu(1).T


def _damage(seen: Tensor, unseen_root: Tensor, strength: float, block: int) -> float:
    """tr(L^-1 M L^-T) with the factor L of one moment and the root of the other, M = unseen_root unseen_root^T."""
    factor = block_factor(regularized(seen, strength), block)
    return float(torch.linalg.solve_triangular(factor, unseen_root, upper=False).square().sum())
