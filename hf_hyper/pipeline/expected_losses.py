"""How much the loss of a model feels the rounding of each of its weights, before any of them is rounded.

Rates that differ from tensor to tensor must be known before the pass that rounds, and moments come layer by layer in
that pass. Keeping those of all layers would take 2.4 GB for SmolLM2-135M and 200 GB for a Llama of 8 billion weights;
so there is a pass of its own over an eighth of the text, which is enough (`rounding/sensitivity.py`).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_hyper.nn.replace import weight_of
from hf_hyper.pipeline.gradients import layer_backward
from hf_hyper.pipeline.stack import Stack
from hf_hyper.plan import Plan
from hf_hyper.rounding import sensitivity

__all__ = ["expected_losses"]

SHARE = 8
"""One window of so many is looked at, but at least one batch."""


def expected_losses(
    stack: Stack,
    states: Tensor,
    gradients: Tensor,
    modules: Callable[[int], Mapping[str, nn.Module]],
    plans: Mapping[str, Plan],
) -> dict[str, float]:
    """Divergence from the original, in nats a token, that a distortion of one in a weight's code would cost.

    Args:
        stack: Layers, none of them compressed.
        states: Hidden states before every layer and after the last one, `[layers + 1, n, length, hidden]`.
        gradients: Of the loss with respect to the last of them; not changed.
        modules: Linear modules and banks of experts of a layer, by name in the model.
        plans: How to store their weights, by the same names.

    Returns:
        By name of every module that the loss depends on.
    """
    windows = len(gradients)
    count = stack.batch_size * max(1, windows // stack.batch_size // SHARE)
    chosen = torch.arange(count, device=gradients.device) * windows // count
    gradients = gradients[chosen]
    tokens = gradients[..., 0].numel()
    losses: dict[str, float] = {}
    for index in logging.tqdm(range(len(stack) - 1, -1, -1), desc="Choosing rates", unit="layer"):
        known = layer_backward(stack, index, states[index, chosen], modules(index), gradients, accumulation=True)
        for name in list(known):
            weight = weight_of(stack.model.get_submodule(name))
            losses[name] = sensitivity(weight, plans[name].scheme, known.pop(name), name=name) / 2 / tokens
    return losses
