"""What becomes of one weight under a `HyperConfig`: scheme and layout, or nothing.

Everything that decides is here and in writing:

- A weight whose stored form would take 16 bits a weight or more is left alone. Scales, padding and constants make up
  most of a tiny layer.
- A convolution keeps its rows, unless another number of rows takes 5 % less; then the closest one within 5 % of the
  least is taken.
- A weight of which one eighth or more is exactly zero counts as pruned: its zeros are kept, unless storing it whole
  takes fewer bits.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_hyper import codec
from hf_hyper.config import HyperConfig
from hf_hyper.layout import MASK, Layout, prune
from hf_hyper.scheme import TensorScheme

__all__ = ["LEAST_GAIN", "PRUNED", "Plan", "bits_per_weight", "plan_shape", "plan_weight"]

LEAST_GAIN = 16.0
"""Stored bits per weight from which a layer is left alone."""

PRUNED = 1 / 8
"""Share of exact zeros from which a weight counts as pruned."""

_NEAR_LEAST = 1.05


@dataclass(frozen=True)
class Plan:
    """How one weight will be stored.

    Attributes:
        scheme: How its matrix is stored.
        layout: How it becomes that matrix.
        mask: Tensor of the places of the weights that are kept, for a pruned one.
    """

    scheme: TensorScheme
    layout: Layout
    mask: Tensor | None = None

    def quantize(self, weight: Tensor, effort: str, name: str = "weight") -> dict[str, Tensor]:
        """Stored tensors of the weight, as `nn.stored.layer_specs` lists them."""
        tensors = codec.quantize(self.layout.to_matrix(weight), self.scheme, effort, name=name)
        return tensors if self.mask is None else {**tensors, MASK: self.mask}


def bits_per_weight(scheme: TensorScheme, layout: Layout) -> float:
    """Stored bits per weight with every overhead, the mask of a pruned weight among them."""
    codes = sum(spec.num_bytes for spec in codec.tensor_specs(scheme).values())
    return 8 * (codes + 4 * layout.mask_words) / layout.num_weights


def plan_shape(config: HyperConfig, shape: tuple[int, ...], reshapable: bool) -> Plan | None:
    """Plan for a weight of which only the shape is known, None where it is left alone.

    Args:
        config: What the user asked for.
        shape: Of the weight, two dimensions or more.
        reshapable: Whether the matrix may have other rows than the weight: convolutions may, linear layers and
            embeddings keep theirs for kernels that slice them.
    """
    if 0 in shape:
        return None
    plans = [_plan(config, Layout(shape))]
    if reshapable:
        plans += [_plan(config, Layout(shape, rows)) for rows in _divisors(math.prod(shape)) if rows != shape[0]]
    cost = [bits_per_weight(plan.scheme, plan.layout) for plan in plans]
    near = [i for i in range(len(plans)) if cost[i] <= _NEAR_LEAST * min(cost)]
    chosen = min(near, key=lambda i: abs(math.log(plans[i].layout.matrix[0] / shape[0])))
    return plans[chosen] if cost[chosen] < LEAST_GAIN else None


def plan_weight(config: HyperConfig, weight: Tensor, plan: Plan) -> Plan:
    """Plan for a weight that is known: that for its shape, or one that keeps its zeros.

    Args:
        config: What the user asked for.
        weight: Floating point, of the shape of the plan.
        plan: From `plan_shape`.
    """
    kept = int(weight.count_nonzero())
    if kept == 0 or kept > (1 - PRUNED) * weight.numel():
        return plan
    layout, mask = prune(weight)
    pruned = dataclasses.replace(_plan(config, layout), mask=mask)
    cost: Callable[[Plan], float] = lambda plan: bits_per_weight(plan.scheme, plan.layout)  # noqa: E731
    return pruned if cost(pruned) <= cost(plan) else plan


def _plan(config: HyperConfig, layout: Layout) -> Plan:
    return Plan(config.scheme(*layout.matrix), layout)


def _divisors(number: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
