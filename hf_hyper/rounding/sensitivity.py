"""What coding a weight will cost, before it is coded.

A code of b bits leaves noise N that is white in the rotated basis: in every row D(b) times its variance. Feedback with
the factors of both moments makes of it the error E = L_O^-T N L_I^-1. With gradients g at the outputs of the layer for
inputs x, it costs a window half the square of the sum over its tokens of g^T E x; in the mean over N

    D(b) / 2 * |sum over tokens of (S L_O^-1 g) (L_I^-1 x)^T|²,    S the deviations of the rows.

Tokens are summed before they are squared: where attention gathers the outputs of many (`v_proj` above all), one noise
in the weight moves them all alike. And the windows are others than those of the moments: what feedback was taught by
one text helps another less.

Against the divergence measured with one tensor of SmolLM2's twin compressed to 3 bits that is 0.9 to 1.1 times as much
in the mean and scatters by a factor of 1.3 (one deviation, 28 tensors; `NOTES.md`). Rates chosen by it do worse than it
promises: some tokens are damaged most by every tensor, and cannot lose without end. So there is a second measure, for
tensors that are compressed together: with every token divided by the length of its gradient, as in the moments.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_hyper import codec
from hf_hyper.rotation.incoherence import rotate_input, rotate_output, rotate_weight
from hf_hyper.rounding.calibrated import Knowledge
from hf_hyper.rounding.experts import ExpertKnowledge
from hf_hyper.rounding.moments import Moment, block_factor, both_sides, regularized
from hf_hyper.routing import rows_by_expert
from hf_hyper.scheme import TILE, TensorScheme

__all__ = ["Sensitivity"]

STRENGTH = 0.1
"""Of the identity in the factors. They are made of little text, of which `trust` would ask for more."""


class Sensitivity:
    """Damage that the code of one weight will do to a text, for every unit of the code's distortion.

    Distortions are in `encoders.shift.DISTORTION`.

    Args:
        weight: `[out_features, in_features]`, with the number of experts in front for a bank of experts.
        scheme: How it will be stored; its bits do not matter.
        knowledge: Of this weight, with gradients, from other text.
        name: What errors call the tensor.

    Raises:
        ShapeError: As `codec.quantize`.
    """

    def __init__(
        self, weight: Tensor, scheme: TensorScheme, knowledge: Knowledge | ExpertKnowledge, *, name: str = "weight"
    ) -> None:
        if isinstance(knowledge, Knowledge):
            self._noises: Sequence[_Noise] = [_Noise(weight, scheme, knowledge, name)]
        else:
            self._noises = [
                _Noise(own, scheme, known, f"{name}[{expert}]")
                for expert, (own, known) in enumerate(zip(weight, knowledge.by_expert(), strict=True))
            ]
        self._sums = torch.zeros(4, device=weight.device)

    @property
    def alone(self) -> float:
        """Twice the divergence in nats, summed over the windows that were added, if no other weight is coded."""
        return float(self._sums[0])

    @property
    def among_others(self) -> float:
        """The same with every token divided by the length of its gradient, in units of the mean length."""
        _, damage, length, tokens = self._sums.tolist()
        return damage * length / max(tokens, 1)

    def add(self, rows: Tensor, gradient: Tensor, ids: Tensor | None = None) -> None:
        """Count what passed the layer.

        Args:
            rows: x, `[n, length, in_features]` for n texts, `[n, in_features]` for tokens that are taken one by one.
            gradient: g, as many rows of `out_features`, of the loss summed over tokens.
            ids: `[n]` experts of tokens taken one by one, for a bank of experts.
        """
        if rows.ndim == 2:
            rows, gradient = rows.unsqueeze(1), gradient.unsqueeze(1)
        if ids is None:
            self._sums += self._noises[0].sums(rows, gradient)
            return
        for expert, own in rows_by_expert(ids, len(self._noises)):
            self._sums += self._noises[expert].sums(rows[own], gradient[own])


class _Noise:
    """Noise of a code, as feedback leaves it in one matrix."""

    def __init__(self, weight: Tensor, scheme: TensorScheme, knowledge: Knowledge, name: str) -> None:
        assert knowledge.outputs is not None
        out_scale, unit = codec.split_rows(codec.checked(weight, scheme, name))
        self.scheme, self.out_scale = scheme, out_scale.float()
        self.deviation = rotate_weight(unit, scheme).square().mean(1).sqrt()
        self.inputs = self._factor(knowledge.inputs, self._rotate_input)
        self.outputs = self._factor(knowledge.outputs, self._rotate_output)

    def sums(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Damage of noise of variance one in units of the rows' deviations, the same with every token divided by the
        length of its gradient, these lengths, and how many there are: `[4]`, summed over windows.
        """
        gradient = gradient.float()
        length = gradient.norm(dim=-1, keepdim=True)
        x = _solve(self.inputs, self._rotate_input(rows.float()))
        g = _solve(self.outputs, self._rotate_output(gradient)) * self.deviation
        pairs = g @ g.mT * (x @ x.mT)
        root = length.sqrt().clamp(min=torch.finfo(length.dtype).tiny)
        tokens = length.new_tensor(float(length.numel()))
        return torch.stack([pairs.sum(), (pairs / root / root.mT).sum(), length.sum(), tokens])

    def _rotate_input(self, x: Tensor) -> Tensor:
        return rotate_input(x, self.scheme)

    def _rotate_output(self, y: Tensor) -> Tensor:
        return rotate_output(y * self.out_scale, self.scheme)

    @staticmethod
    def _factor(moment: Moment, rotate: Callable[[Tensor], Tensor]) -> Tensor:
        return block_factor(regularized(both_sides(moment.mean(), rotate), STRENGTH), TILE)


def _solve(factor: Tensor, rows: Tensor) -> Tensor:
    """L^-1 v for rows v `[..., n]`, which are one matrix to the solver: it would copy L for each of several."""
    return torch.linalg.solve_triangular(factor.T, rows.flatten(0, -2), upper=True, left=False).view_as(rows)
