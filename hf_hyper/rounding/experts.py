"""Calibrated rounding of the weights of experts: each with what it has seen itself.

A router sends an expert a small and peculiar part of the text, so every expert has second moments of its own. Of few
rows these say little: each is filled up with `PRIOR` rows a column of the mean over all experts, which counts for
nothing where many times more rows were seen and for everything where none were.

Memory: 8 bytes for every pair of inputs, and of outputs where gradients are taken, times the number of experts that
were seen.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_hyper.codec import stacked
from hf_hyper.rounding.calibrated import Knowledge, quantize_calibrated
from hf_hyper.rounding.moments import Moment
from hf_hyper.routing import rows_by_expert
from hf_hyper.scheme import TensorScheme

__all__ = ["ExpertKnowledge", "ExpertMoments", "quantize_experts"]

PRIOR = 0.5
"""Rows of the shared moment that an expert's own is filled up with, for every column."""


class ExpertMoments:
    """A `Moment` for each expert, over the rows that were sent to it.

    Args:
        experts: Number of experts.
        width: Length of a row.
        device: Where moments are kept.
    """

    def __init__(self, experts: int, width: int, device: torch.device | str = "cpu") -> None:
        self.experts, self.width, self.device = experts, width, device
        self._own: dict[int, Moment] = {}

    def add(self, rows: Tensor, ids: Tensor, half: int) -> None:
        """Count rows `[n, width]` into half 0 or 1 of their experts `[n]`.

        Raises:
            ShapeError: The rows have another width, or hold NaN or infinity.
        """
        for expert, own in rows_by_expert(ids, self.experts):
            self._own.setdefault(expert, Moment(self.width, self.device)).add(rows[own], half)

    def count(self, expert: int) -> int:
        """Rows that an expert has seen."""
        return sum(self._own[expert].counts) if expert in self._own else 0

    def filled_up(self, prior: float = PRIOR) -> Iterator[Moment]:
        """The moment of one expert after the other, with `prior` times `width` rows of the shared one in it."""
        shared = Moment(self.width, self.device)
        for own in self._own.values():
            _pour(own, shared)
        for expert in range(self.experts):
            moment = Moment(self.width, self.device)
            if expert in self._own:
                _pour(self._own[expert], moment)
            for half, mean in enumerate(shared.halves):
                rows = round(prior * self.width / 2)
                moment.add_product(rows * mean, rows, half)
            yield moment


@dataclass(frozen=True)
class ExpertKnowledge:
    """What calibration knows of one bank of experts.

    Attributes:
        inputs: Second moments of the inputs, perhaps weighed by token.
        outputs: Those of the loss gradients at the outputs; None where none were taken.
    """

    inputs: ExpertMoments
    outputs: ExpertMoments | None = None

    def by_expert(self) -> Iterator[Knowledge]:
        """Knowledge of one expert after the other."""
        outputs = iter(()) if self.outputs is None else self.outputs.filled_up()
        for inputs in self.inputs.filled_up():
            yield Knowledge(inputs, next(outputs, None))

    def output_error(self, weight: Tensor, decoded: Iterable[Tensor]) -> float:
        """`E|(W - W') x|² / E|W x|²` over all rows and their experts, 0 for outputs that are all zero.

        Args:
            weight: W, `[experts, out_features, in_features]`.
            decoded: W' of one expert after the other.
        """
        damage, energy = 0.0, 0.0
        moments = self.inputs.filled_up(prior=0)
        for expert, (own, other, moment) in enumerate(zip(weight, decoded, moments, strict=True)):
            mean, rows = moment.mean(), self.inputs.count(expert)
            own, error = own.float(), own.float() - other.float()
            damage += rows * float(((error @ mean) * error).sum())
            energy += rows * float(((own @ mean) * own).sum())
        return damage / energy if energy > 0 else 0.0


def quantize_experts(
    weight: Tensor,
    scheme: TensorScheme,
    effort: str,
    knowledge: ExpertKnowledge,
    *,
    plain: bool = False,
    name: str = "weight",
) -> dict[str, Tensor]:
    """Store a bank of experts so that their outputs stay close; see `quantize_calibrated`.

    Args:
        weight: `[experts, out_features, in_features]` floating point.
        scheme: How to store every expert; `shift` with incoherence.
        effort: Thoroughness of the search: `fast`, `balanced` or `best`.
        knowledge: Of this bank.
        plain: LDLQ as published.
        name: What errors call the tensor.

    Returns:
        Tensors as `codec.tensor_specs(scheme)` lists them, with a dimension of experts in front.
    """
    return stacked(
        quantize_calibrated(own, scheme, effort, known, plain=plain, name=f"{name}[{expert}]")
        for expert, (own, known) in enumerate(zip(weight, knowledge.by_expert(), strict=True))
    )


def _pour(source: Moment, target: Moment) -> None:
    for half, (mean, count) in enumerate(zip(source.halves, source.counts, strict=True)):
        target.add_product(mean * count, count, half)
