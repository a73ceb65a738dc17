"""How much the loss of a model feels the rounding of each of its weights, before any of them is rounded.

Rates that differ from tensor to tensor must be known before the pass that rounds, and moments come layer by layer in
that pass. Keeping those of all layers would take 2.4 GB for SmolLM2-135M and 200 GB for a Llama of 8 billion weights;
so there is a pass of its own over an eighth of the text, two batches at least: moments from one half of that, damage to
the other half (`rounding/sensitivity.py`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_hyper.errors import ShapeError
from hf_hyper.nn.replace import weight_of
from hf_hyper.pipeline.gradients import layer_backward, layer_gradients
from hf_hyper.pipeline.stack import Stack
from hf_hyper.plan import Plan
from hf_hyper.rounding import Sensitivity

__all__ = ["ExpectedLoss", "expected_losses"]

SHARE = 16
"""One window of so many is taken for the moments, and one for the damage, but at least one batch for each."""


@dataclass(frozen=True)
class ExpectedLoss:
    """What a distortion of one in the code of a weight would cost.

    Attributes:
        alone: Divergence from the original model in nats a token, if no other weight is coded; half the squared error
            of the last hidden states for a model without a vocabulary.
        among_others: A measure to compare weights by that are coded together; see `rounding/sensitivity.py`.
    """

    alone: float
    among_others: float


def expected_losses(
    stack: Stack,
    states: Tensor,
    gradients: Tensor,
    modules: Callable[[int], Mapping[str, nn.Module]],
    plans: Mapping[str, Plan],
) -> dict[str, ExpectedLoss]:
    """How much the loss would feel the code of every weight.

    Args:
        stack: Layers, none of them compressed.
        states: Hidden states before every layer and after the last one, `[layers + 1, n, length, hidden]`.
        gradients: Of the loss with respect to the last of them; not changed.
        modules: Linear modules and banks of experts of a layer, by name in the model.
        plans: How to store their weights, by the same names.

    Returns:
        By name of every module that the loss depends on.

    Raises:
        ShapeError: Gradients are not finite.
    """
    windows = len(gradients)
    count = stack.batch_size * max(1, windows // stack.batch_size // SHARE)
    chosen = torch.arange(2 * count, device=gradients.device) * windows // (2 * count)
    known_by, judged_by = chosen[::2], chosen[1::2]
    first, second = gradients[known_by], gradients[judged_by]
    tokens = second[..., 0].numel()
    losses: dict[str, ExpectedLoss] = {}
    for index in logging.tqdm(range(len(stack) - 1, -1, -1), desc="Choosing rates", unit="layer"):
        own = modules(index)
        known = layer_backward(stack, index, states[index, known_by], own, first)
        found: dict[str, Sensitivity] = {}
        for name in list(known):
            found[name] = Sensitivity(weight_of(own[name]), plans[name].scheme, known.pop(name), name=name)
        watched = {name: own[name] for name in found}
        notes = {name: each.add for name, each in found.items()}
        layer_gradients(stack, index, states[index, judged_by], watched, second, notes)
        for name, each in found.items():
            losses[name] = ExpectedLoss(each.alone / 2 / tokens, each.among_others / 2 / tokens)
            if not math.isfinite(losses[name].alone) or not math.isfinite(losses[name].among_others):
                raise ShapeError(
                    f"{name}: gradients of the calibration text are NaN or infinite; load the model in float32 or "
                    "bfloat16, or give another text"
                )
    return losses
