"""What becomes of one weight under a `HyperConfig`: scheme and layout, or nothing.

Everything that decides is here and in writing:

- A weight whose stored form would take 16 bits a weight or more is left alone. Scales, padding and constants make up
  most of a tiny layer.
- A convolution keeps its rows, unless another number of rows takes 5 % less; then the closest one within 5 % of the
  least is taken.
- A weight of which one eighth or more is exactly zero counts as pruned: its zeros are kept, unless storing it whole
  takes fewer bits.
- A bank of experts `[experts, out, in]` is stored expert by expert with one scheme, its zeros like other weights.
- `winding` with `loss_max` takes the fewest bits a code that keep the mean absolute error within that bound; where not
  even all the bits do, the weight stays as it is.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_hyper import codec
from hf_hyper.config import HyperConfig
from hf_hyper.hyperfunctions.winding import WindingOptions, code_width
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
        if self.layout.experts is not None:
            return codec.stacked(
                codec.quantize(matrix, self.scheme, effort, name=f"{name}[{expert}]")
                for expert, matrix in enumerate(self.layout.matrices(weight))
            )
        tensors = codec.quantize(self.layout.to_matrix(weight), self.scheme, effort, name=name)
        return tensors if self.mask is None else {**tensors, MASK: self.mask}


def bits_per_weight(scheme: TensorScheme, layout: Layout) -> float:
    """Stored bits per weight with every overhead, the mask of a pruned weight among them."""
    codes = sum(spec.num_bytes for spec in codec.tensor_specs(scheme).values())
    return 8 * (codes * (layout.experts or 1) + 4 * layout.mask_words) / layout.num_weights


def plan_shape(
    config: HyperConfig, shape: tuple[int, ...], reshapable: bool, bits: float | None = None, *, experts: bool = False
) -> Plan | None:
    """Plan for a weight of which only the shape is known, None where it is left alone.

    Args:
        config: What the user asked for.
        shape: Of the weight, two dimensions or more.
        reshapable: Whether the matrix may have other rows than the weight: convolutions may, linear layers and
            embeddings keep theirs for kernels that slice them.
        bits: Rate of this weight in the place of `config.bits`.
        experts: Whether the first dimension counts experts.
    """
    if 0 in shape:
        return None
    plans = [_plan(config, Layout(shape, experts=shape[0] if experts else None), bits)]
    if reshapable:
        plans += [_plan(config, Layout(shape, rows), bits) for rows in _divisors(math.prod(shape)) if rows != shape[0]]
    cost = [bits_per_weight(plan.scheme, plan.layout) for plan in plans]
    near = [i for i in range(len(plans)) if cost[i] <= _NEAR_LEAST * min(cost)]
    chosen = min(near, key=lambda i: abs(math.log(plans[i].layout.matrix[0] / shape[0])))
    return plans[chosen] if cost[chosen] < LEAST_GAIN else None


def plan_weight(config: HyperConfig, weight: Tensor, plan: Plan) -> Plan | None:
    """Plan for a weight that is known: that for its shape, one that keeps its zeros, one that meets a loss bound.

    Args:
        config: What the user asked for.
        weight: Floating point, of the shape of the plan.
        plan: From `plan_shape`.

    Returns:
        The plan, or None where the weight is to stay as it is.
    """
    kept = int(weight.count_nonzero())
    if plan.layout.experts is None and 0 < kept <= (1 - PRUNED) * weight.numel():
        layout, mask = prune(weight)
        pruned = dataclasses.replace(_plan(config, layout, plan.scheme.bits), mask=mask)
        cost: Callable[[Plan], float] = lambda plan: bits_per_weight(plan.scheme, plan.layout)  # noqa: E731
        plan = pruned if cost(pruned) <= cost(plan) else plan
    return plan if config.loss_max is None else _least(config, weight, plan, config.loss_max)


def _least(config: HyperConfig, weight: Tensor, plan: Plan, loss_max: float) -> Plan | None:
    """The plan with the fewest bits a code whose mean absolute error is at most `loss_max`, by bisection."""
    matrices = [matrix.float() for matrix in plan.layout.matrices(weight)]
    most = code_width(plan.scheme)
    winding = config.winding
    assert isinstance(winding, WindingOptions)
    fixed = winding.num_points is not None  # the number of points decides the width
    low = most if fixed else ((winding.num_shells + 1) * 2 - 1).bit_length()
    best, high = None, most
    while low <= high:
        width = most if best is None else (low + high) // 2  # all bits first: a weight that they fail stays
        scheme = config.scheme(*plan.layout.matrix, bits=width / winding.dimension)
        decoded = (codec.dequantize(codec.quantize(matrix, scheme, config.effort), scheme) for matrix in matrices)
        loss = sum(float((one - matrix).abs().sum()) for one, matrix in zip(decoded, matrices, strict=True))
        if loss <= loss_max * weight.numel():
            best, high = dataclasses.replace(plan, scheme=scheme), width - 1
        elif best is None:
            return None
        else:
            low = width + 1
    return best


def _plan(config: HyperConfig, layout: Layout, bits: float | None) -> Plan:
    return Plan(config.scheme(*layout.matrix, bits=bits), layout)


def _divisors(number: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
