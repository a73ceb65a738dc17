"""Fit the row scales of a compressed model to the model's own loss.

Rounding picks the codes of every layer by what that layer does alone. Afterwards the codes stay, and the two scales of
each row (`scale` in the rotated basis, `out_scale` before it) make up for what the layers do to each other: they move
down the gradient of the KL divergence from the original model on the calibration text, and go as far, if anywhere, as
helps a part of the text that they were not fitted to. Nothing is stored that was not stored before, no weight is
trained, and no label is read.

For a layer y = diag(o) R^T diag(s) V x with the gradient g at y, both gradients follow from y and g alone:

    dL / d log o_i = sum over tokens of g_i y_i
    dL / d log s_j = sum over tokens of (R diag(o) g)_j (R diag(1/o) y)_j

A bank of experts has these scales for each expert, and sums over the tokens that were sent to it.

Layers run one after the other forward, then back, each once more with gradients: memory holds the hidden states of one
batch after every layer, and the activations of one batch in one layer. Compressed layers after the last one, an output
head for instance, are fitted with the others.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_hyper import codec
from hf_hyper.encoders.shift import DISTORTION, stored_scale
from hf_hyper.errors import ShapeError
from hf_hyper.nn import HyperExpertBank, HyperLinear
from hf_hyper.pipeline.stack import Stack
from hf_hyper.rotation.incoherence import rotate_output

__all__ = ["can_fit", "fit_scales_to_loss"]

BATCH_TOKENS = 512
"""Tokens to a step, one window where windows are longer."""

STEP = 0.015
"""First step of Adam, relative to a scale, over the relative error of the codes: what steps add to a scale beyond its
gradient is noise, which may be the greater the more the codes have. The steps fall to zero along a line."""

HELD_OUT = 8
"""One batch of so many is not fitted to but says how far to go; a text of fewer is fitted to whole, all of the way."""

SHARES = (0.0, 0.5, 1.0)
"""Of the way from the scales before the fit to those after it."""


Fitted = HyperLinear | HyperExpertBank
"""Layers whose scales can be fitted."""


@torch.no_grad()
def fit_scales_to_loss(
    model: nn.Module,
    layers: Sequence[Fitted],
    windows: Tensor,
    wanted: Tensor,
    passes: float,
    seed: int,
    originals: Mapping[str, nn.Module] | None = None,
) -> list[float]:
    """Move row scales down the gradient of the divergence from the original model, in place.

    Args:
        model: Compressed, in evaluation mode, without parameters that learn.
        layers: Compressed layers of it that `can_fit`, at least one.
        windows: `[n, length]` token ids.
        wanted: Hidden states of the original model after its last layer, `[n, length, hidden]`.
        passes: Passes over the text.
        seed: Of the order of the windows.
        originals: Modules of the original model by name, where others have taken their places after the last layer.

    Returns:
        Divergence in nats a token before every step, of the text of that step; half the squared error of the last
        hidden states for a model without a vocabulary.

    Raises:
        ShapeError: The divergence or its gradient is NaN or infinite; the layers keep the scales of the step before.
    """
    size = max(1, min(BATCH_TOKENS // windows.shape[1], len(windows)))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[: len(windows) // size * size]
    stack = Stack(model, windows[order.to(windows.device)], size)
    scales = [_Scales(layer) for layer in layers]
    adam = torch.optim.Adam([{"params": each.logs, "lr": each.step()} for each in scales], betas=(0.9, 0.99))
    batches = [slice(start, start + size) for start in range(0, len(order), size)]
    held = [batches.pop() for _ in range(len(batches) // HELD_OUT)]
    steps = max(1, round(passes * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)

    def batch(place: slice) -> tuple[Tensor, Tensor, Mapping[str, nn.Module]]:
        return stack.entries[place], wanted[order[place].to(wanted.device)], originals or {}

    losses = []
    for step in logging.tqdm(range(steps), desc="Fitting scales", unit="step"):
        losses.append(_backward(stack, scales, *batch(batches[step % len(batches)])))
        if not math.isfinite(losses[-1]) or not all(each.finite() for each in scales):
            what = "divergence" if not math.isfinite(losses[-1]) else "gradient of the divergence"
            raise ShapeError(
                f"the {what} from the original model is not finite in step {step + 1} of {steps} of the fit; "
                "load the model in float32 or bfloat16, or leave the fit out with rounding='fisher'"
            )
        adam.step()
        schedule.step()
        for each in scales:
            each.store()
    if held:
        found = {}
        for share in SHARES:
            for each in scales:
                each.store(share)
            found[share] = sum(_loss(stack, *batch(place)) for place in held)
        best = min(found, key=lambda share: found[share])
        for each in scales:
            each.store(best)
    return losses


def can_fit(layer: nn.Module) -> TypeGuard[Fitted]:
    """Whether a layer's scales can be fitted: linear layers whose matrix is stored as it is, and banks of experts, with
    rotations.
    """
    if not isinstance(layer, Fitted):
        return False
    return layer.scheme.incoherence and (layer.layout.plain or layer.layout.experts is not None)


class _Scales:
    """The scales of one layer: logarithms that move, and the stored tensors that follow."""

    def __init__(self, layer: Fitted) -> None:
        self.layer = layer
        scale, out_scale = layer.get_parameter("scale"), layer.get_parameter(codec.OUT_SCALE)
        self.start = scale.detach().float(), out_scale.detach().float()
        self.logs = tuple(torch.zeros_like(start).requires_grad_() for start in self.start)

    def watch(self) -> torch.utils.hooks.RemovableHandle:
        """Gather gradients from now on."""
        return self.layer.register_forward_hook(self._attach)

    def finite(self) -> bool:
        """Whether all gradients are."""
        return all(log.grad is None or bool(log.grad.isfinite().all()) for log in self.logs)

    def step(self) -> float:
        """First step of Adam."""
        return STEP * math.sqrt(DISTORTION[int(self.layer.scheme.bits)])

    @torch.no_grad()
    def store(self, share: float = 1.0) -> None:
        """Write the scales into the layer, so much of the way that they have moved, and forget the gradients."""
        scale, out_scale = (start * (share * log).exp() for start, log in zip(self.start, self.logs, strict=True))
        self.layer.get_parameter("scale").copy_(stored_scale(scale))
        self.layer.get_parameter(codec.OUT_SCALE).copy_(codec.stored_out_scale(out_scale))
        for log in self.logs:
            log.grad = None

    def _attach(self, layer: Fitted, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            bias = layer.bias if isinstance(layer, HyperLinear) else None
            plain = output.detach() if bias is None else output.detach() - bias.detach()
            output.register_hook(functools.partial(self._gather, plain, *arguments[1:]))

    def _gather(self, output: Tensor, *rest: Tensor) -> None:
        """Add the gradients of one batch: from its outputs, the experts of a bank's rows, and the outputs' gradient."""
        *ids, gradient = rest
        output, gradient = (rows.reshape(-1, rows.shape[-1]).float() for rows in (output, gradient))
        own = self.layer.get_parameter(codec.OUT_SCALE).float()
        ids = [each.clamp(0, len(own) - 1) for each in ids]  # rows without an expert are zeros and add nothing
        own = own[ids[0]] if ids else own
        unit = torch.where(own != 0, output / own, 0.0)
        scheme = self.layer.scheme
        found = rotate_output(gradient * own, scheme) * rotate_output(unit, scheme), gradient * output
        for log, part in zip(self.logs, found, strict=True):
            total = torch.zeros_like(log).index_add(0, ids[0], part) if ids else part.sum(0)
            log.grad = total if log.grad is None else log.grad + total


def _backward(
    stack: Stack, scales: list[_Scales], states: Tensor, wanted: Tensor, originals: Mapping[str, nn.Module]
) -> float:
    """Gradients of the loss of one batch with respect to all scales; the loss."""
    before = []
    with torch.no_grad():
        for index in range(len(stack)):
            before.append(states)
            states = stack.run(index, states)
    handles = [each.watch() for each in scales]
    try:
        loss, gradient = _divergence(stack, states, wanted, originals)
        for index in range(len(stack) - 1, -1, -1):
            gradient = stack.backward(index, before.pop(), gradient)
    finally:
        for handle in handles:
            handle.remove()
    return loss


def _loss(stack: Stack, states: Tensor, wanted: Tensor, originals: Mapping[str, nn.Module]) -> float:
    """The loss of one batch."""
    for index in range(len(stack)):
        states = stack.run(index, states)
    return _divergence(stack, states, wanted, originals)[0]


def _divergence(
    stack: Stack, states: Tensor, wanted: Tensor, originals: Mapping[str, nn.Module]
) -> tuple[float, Tensor]:
    """Mean divergence a token for last hidden states `[n, length, hidden]`, and its gradient."""
    tokens, loss = states[..., 0].numel(), 0.0
    gradients = torch.empty_like(states)
    for place in range(len(states)):
        with _in_place(stack.model, originals):
            original = stack.finish(wanted[place : place + 1])
        leaf = states[place : place + 1].clone().requires_grad_(True)
        with torch.enable_grad():
            output = stack.finish(leaf)
        if (logits := output.get("logits")) is not None:
            log_q = torch.log_softmax(logits.detach().float(), -1)
            log_p = torch.log_softmax(original["logits"].float(), -1)
            p = log_p.exp()
            loss += float((p * (log_p - log_q)).sum()) / tokens
            logits.backward(((log_q.exp() - p) / tokens).to(logits.dtype))
        else:
            last = output["last_hidden_state"]
            missed = last.detach() - original["last_hidden_state"]
            loss += float(missed.float().square().sum()) / 2 / tokens
            last.backward(missed / tokens)
        assert leaf.grad is not None
        gradients[place] = leaf.grad[0]
    return loss, gradients


@contextlib.contextmanager
def _in_place(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules into a model for a while, by name."""
    own = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        model.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)
