"""Compress a model that is in memory, layer by layer, with knowledge of a calibration text.

1. Forward through the layers; the hidden states between them go to a scratch file. Where rates are chosen by loss, back
   over an eighth of the text, two batches at least, to see how much each weight matters (`expected_losses.py`).
2. Backward from the loss, last layer first. Of every linear layer the second moments of its inputs and of the gradients
   at its outputs are taken; it is rounded with feedback, and the compressed layer takes its place.
3. The row scales of the compressed model are fitted to its divergence from the original (`fit.py`).

Without gradients one pass forward does the first two. Layers outside the list are compressed without calibration,
before the fit. Beside the model, memory holds at most

- the second moments of one layer, in float32 and in two halves: 8 bytes for every pair of inputs and every pair of
  outputs of each weight, of every expert that the text is sent to where there are experts; while rates are chosen 4
  more, of every expert;
- while a weight is rounded, 36 bytes for every pair of its inputs and of its outputs and 32 for every weight;
- the activations of one batch in one layer, for a backward pass;
- the logits of one window and, while their loss is taken, seven copies of them in float32;
- the text's hidden states twice: gradients, or inputs of the fit, and a batch or the beginning of the next;
- in the fit, the hidden states of one batch after every layer, and the originals of output heads that are compressed.

A scratch file takes `layers + 1` times the bytes of the text's hidden states; on the CPU it is mapped, and its pages
count as resident until the system needs them; a GPU holds them all. Finished tensors are kept in the current
`TensorStore`, so that a run that was stopped does not search them again; rates and the fit start anew.
"""

import contextlib
import dataclasses
import functools
import hashlib
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_hyper.config import FORMAT_VERSION, WITH_GRADIENTS
from hf_hyper.encoders.shift import DISTORTION
from hf_hyper.errors import ConfigError
from hf_hyper.nn.replace import hyper_modules, weight_of
from hf_hyper.nn.stored import HyperLayer, decode_experts, relative_error
from hf_hyper.pipeline.allocate import bits_by_loss, bits_within_loss
from hf_hyper.pipeline.expected_losses import ExpectedLoss, expected_losses
from hf_hyper.pipeline.fit import can_fit, fit_scales_to_loss
from hf_hyper.pipeline.gradients import layer_backward, layer_forward, states_by_layer, top_gradients
from hf_hyper.pipeline.module import filled
from hf_hyper.pipeline.stack import Stack
from hf_hyper.plan import Plan
from hf_hyper.rounding import ExpertKnowledge, Knowledge, output_error, quantize_calibrated, quantize_experts
from hf_hyper.storage.resume import TensorStore

__all__ = ["compress_loaded"]

BATCH_TOKENS = 4096
"""Tokens of a batch; a layer sees those of one text of each of its windows at once."""

SEARCHES = {"fast": "fast", "balanced": "best", "best": "best"}
"""Search of the codes by effort: beside gradients and the fit a full one takes little time."""

FIT_PASSES = {"fast": 1, "balanced": 1, "best": 4}
"""Passes over the text for the fit of the scales, by effort."""


@torch.no_grad()
def compress_loaded(
    model: nn.Module,
    plans: Mapping[str, Plan],
    windows: Tensor | None,
    effort: str,
    *,
    rounding: str = "fit",
    seed: int = 0,
    average: float | None = None,
    max_kl: float | None = None,
) -> dict[str, dict[str, float]]:
    """Compress layers of a model in place.

    Args:
        model: In memory, on one device, with a list of layers (`Stack`) if it is to be calibrated.
        plans: How to store the weights, by module name. Layers outside the list, and weights that are no plain
            matrix, are compressed without calibration.
        windows: `[n, length]` token ids of the calibration text; None to compress all without.
        effort: Thoroughness of the search: `fast`, `balanced` or `best`.
        rounding: `fit`; `fisher`, which fits no scales; `ldlq` or `plain`, which take no gradients
            (`quantize_calibrated`).
        seed: Of the tokens drawn from the model, and of the order in which the fit reads the text.
        average: Bits per weight over all plans, for rates of the calibrated ones to be chosen by the loss that is
            expected of them (with gradients only); None keeps the rates of the plans.
        max_kl: Divergence in nats a token that may be expected of the calibrated weights, in the place of the average.

    Returns:
        `relative_error`, `output_error` where inputs are known, `expected_loss` where rates were chosen by it, and
        `seconds` by module name; errors are those of rounding, before the fit.

    Raises:
        ConfigError: The model cannot be run layer by layer.
        ShapeError: A weight or an activation is not finite.
    """
    store = TensorStore.current()
    search = "fisher" if rounding == "fit" else rounding
    question = f"calibrated,{effort},{search},{seed},format={FORMAT_VERSION},hf-hyper={version('hf-hyper')}"
    with logging.tqdm(total=len(plans), desc="Compressing", unit="tensor") as bar:
        job = _Job(model, dict(plans), effort, rounding, store, question, bar)
        if windows is not None:
            if store.folder is not None:
                job.question += f",{_fingerprint([windows, *model.parameters()])}"
            _compress_stack(job, windows.to(next(model.parameters()).device), seed, average, max_kl)
        job.compress_rest()
    return {name: job.measured[name] for name in plans}


@dataclass
class _Job:
    """Compression of one module after another."""

    model: nn.Module
    plans: dict[str, Plan]
    effort: str
    rounding: str
    store: TensorStore
    question: str
    bar: Any
    losses: dict[str, ExpectedLoss] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)

    def choose_rates(self, losses: dict[str, ExpectedLoss], average: float | None, max_kl: float | None) -> None:
        """Spend the bits that the other modules leave, or as few as the bound allows, where they spare the most."""
        if not losses:
            if max_kl is not None:
                raise ConfigError("no weight that calibration can round is to be compressed; give bits, not max_kl")
            return
        sizes = {name: plan.layout.num_weights for name, plan in self.plans.items()}
        own = {name: sizes[name] for name in losses}
        felt = {name: loss.among_others for name, loss in losses.items()}
        if max_kl is not None:
            rates = bits_within_loss(own, felt, {name: loss.alone for name, loss in losses.items()}, max_kl)
        else:
            assert average is not None
            others = sum(self.plans[name].scheme.bits * size for name, size in sizes.items() if name not in losses)
            rates = bits_by_loss(own, felt, (average * sum(sizes.values()) - others) / sum(own.values()))
        for name, bits in rates.items():
            plan = self.plans[name]
            self.plans[name] = dataclasses.replace(plan, scheme=dataclasses.replace(plan.scheme, bits=bits))
        self.losses = losses

    def compress_all(self, known: dict[str, Knowledge | ExpertKnowledge]) -> None:
        """Compress several modules, and forget what was known of each."""
        for name in list(known):
            self.compress(name, known.pop(name))

    def compress_rest(self) -> dict[str, nn.Module]:
        """Compress what is left, without calibration; the original modules by name."""
        originals = {name: self.model.get_submodule(name) for name in self.plans if name not in self.measured}
        for name in originals:
            self.compress(name, None)
        return originals

    def compress(self, name: str, knowledge: Knowledge | ExpertKnowledge | None) -> None:
        """Put the compressed layer in the place of module `name`."""
        started, module, plan = time.perf_counter(), self.model.get_submodule(name), self.plans[name]
        weight = weight_of(module)

        def make() -> dict[str, Tensor]:
            if knowledge is None:
                return plan.quantize(weight, self.effort, name)
            plain = self.rounding == "plain"
            search = SEARCHES[self.effort]
            if isinstance(knowledge, ExpertKnowledge):
                return quantize_experts(weight, plan.scheme, search, knowledge, plain=plain, name=name)
            return quantize_calibrated(weight, plan.scheme, search, knowledge, plain=plain, name=name)

        tensors = self.store.get_or_make(weight, f"{self.question},{name},{plan.scheme.key}", make)
        layer = filled(name, module, plan.scheme, plan.layout, tensors)
        measured = _errors(weight, layer, knowledge)
        self.model.set_submodule(name, layer)
        if name in self.losses:
            measured["expected_loss"] = self.losses[name].alone * DISTORTION[int(plan.scheme.bits)]
        self.measured[name] = {**measured, "seconds": time.perf_counter() - started}
        self.bar.update()


def _errors(weight: Tensor, layer: HyperLayer, knowledge: Knowledge | ExpertKnowledge | None) -> dict[str, float]:
    """`relative_error`, and `output_error` where the inputs are known."""
    stored, key = layer.stored(), layer.scheme.key
    errors = {"relative_error": relative_error(weight, stored, key, layer.layout)}
    if isinstance(knowledge, ExpertKnowledge):
        errors["output_error"] = knowledge.output_error(weight, decode_experts(stored, key))
    elif knowledge is not None:
        errors["output_error"] = output_error(weight, layer.dequantize(torch.float32), knowledge.inputs)
    return errors


def _compress_stack(job: _Job, windows: Tensor, seed: int, average: float | None, max_kl: float | None) -> None:
    """Compress the model's list of layers."""
    windows, batch_size = _whole_batches(windows)
    with _frozen(job.model), tempfile.TemporaryDirectory(prefix="hf-hyper-") as scratch:
        stack = Stack(job.model, windows, batch_size)
        if job.rounding not in WITH_GRADIENTS:
            states = stack.entries
            for index in range(len(stack)):
                job.compress_all(layer_forward(stack, index, states, _modules(stack, index, job.plans), states))
            return
        stack.finish(stack.entries[:1])  # a model without outputs for every token is refused before the long way
        states = states_by_layer(stack, Path(scratch))
        gradients = top_gradients(stack, states[-1], seed)
        if average is not None or max_kl is not None:
            modules_of = functools.partial(_modules, stack, plans=job.plans)
            job.choose_rates(expected_losses(stack, states, gradients, modules_of, job.plans), average, max_kl)
        for index in range(len(stack) - 1, -1, -1):
            modules = _modules(stack, index, job.plans)
            job.compress_all(layer_backward(stack, index, states[index], modules, gradients))
        del gradients, stack
        originals = job.compress_rest()
        layers = [layer for _, layer in hyper_modules(job.model) if can_fit(layer)]
        if job.rounding == "fit" and layers:
            # Embeddings have done their part in the states that are wanted.
            heads = {name: module for name, module in originals.items() if not isinstance(module, nn.Embedding)}
            del originals
            fit_scales_to_loss(job.model, layers, windows, states[-1], FIT_PASSES[job.effort], seed, heads)


def _modules(stack: Stack, index: int, plans: Mapping[str, Plan]) -> dict[str, nn.Module]:
    """Modules of one layer that rounding with feedback can store, by their names in the model."""
    prefix = f"{stack.name}.{index}."
    named = {prefix + name: module for name, module in stack.layers[index].named_modules()}
    return {
        name: module
        for name, module in named.items()
        if name in plans
        and (plans[name].layout.plain or plans[name].layout.experts is not None)
        and not isinstance(module, nn.Embedding)
    }


def _whole_batches(windows: Tensor) -> tuple[Tensor, int]:
    """As many windows as make whole batches, at least two batches where there are two windows; and their size."""
    size = max(1, min(BATCH_TOKENS // windows.shape[1], len(windows) // 2))
    return windows[: len(windows) // size * size], size


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients of parameters; both as before afterwards."""
    training = model.training
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in learning:
            parameter.requires_grad_(True)


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
