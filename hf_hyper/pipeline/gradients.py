"""What every linear layer of a model sees and how the loss feels it: one pass forward, one backward over a text.

The damage of compression is measured by the KL divergence from the original model, whose second derivative is the
Fisher information: the second moment of the gradients of log p(token), with tokens drawn from the model itself. Models
without a vocabulary (encoders) are judged by their last hidden states, and the draw is white noise on these.

For one token with the input x and the gradient g at a layer's output, the damage of an error E is (g^T E x)². Its mean
is taken for tr(O E I E^T) with O = E[g g^T] and I = E[|g|² x x^T] (arXiv 2505.22988, sketch A): inputs count by how
much the loss feels what becomes of them. That is true of small errors only, and the tails of |g| are heavy: in the
first layers of SmolLM2 one token in a hundred holds a third of the sum of |g|², while its own loss cannot grow without
end. So each token is divided by |g|: O = E[g g^T / |g|], I = E[|g| x x^T].

Hidden states between layers live in one file in a scratch folder; layers are revisited from the last to the first, each
run again with gradients. At no time do activations of more than one batch of one layer exist.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_hyper.nn.experts import ExpertBank
from hf_hyper.pipeline.stack import Stack
from hf_hyper.rounding import ExpertKnowledge, ExpertMoments, Knowledge, Moment

__all__ = ["Note", "layer_backward", "layer_forward", "layer_gradients", "states_by_layer", "top_gradients"]

Note = Callable[..., None]
"""What is done with the inputs `[..., in_features]` of a module, the gradient of the loss with respect to its outputs,
and for a bank of experts the experts of the rows, at every call that the loss depends on."""


def states_by_layer(stack: Stack, scratch: Path) -> Tensor:
    """Hidden states before every layer and after the last one.

    Args:
        stack: Layers and their first inputs.
        scratch: Folder for the file that holds them.

    Returns:
        `[layers + 1, n, length, hidden]` in the dtype of the model, a map of the file.
    """
    shape = torch.Size((len(stack) + 1, *stack.entries.shape))
    file = str(scratch / "states.bin")
    states = torch.from_file(file, shared=True, size=shape.numel(), dtype=stack.entries.dtype).view(shape)
    states = states.to(stack.entries.device)
    states[0] = stack.entries
    stack.entries = states[0]  # one copy is enough
    for index in range(len(stack)):
        layer_forward(stack, index, states[index], {}, states[index + 1])
    return states


@torch.enable_grad()
def top_gradients(stack: Stack, states: Tensor, seed: int) -> Tensor:
    """Gradient of the loss, summed over tokens, with respect to the last hidden states.

    Args:
        stack: Layers and model.
        states: Hidden states after the last layer, `[n, length, hidden]`.
        seed: Of the draws.

    Returns:
        As large as `states`, same dtype.
    """
    draw = torch.Generator(device=states.device).manual_seed(seed)
    gradients = torch.empty_like(states)
    for place in range(len(states)):
        leaf = states[place : place + 1].clone().requires_grad_(True)
        output = stack.finish(leaf)
        if (logits := output.get("logits")) is not None:
            logits.backward(_token_gradient(logits.detach().float(), draw).to(logits.dtype))
        else:
            last = output["last_hidden_state"]
            last.backward(torch.randn(last.shape, generator=draw, device=last.device, dtype=last.dtype))
        assert leaf.grad is not None
        gradients[place] = leaf.grad[0]
    return gradients


@torch.no_grad()
def layer_forward(
    stack: Stack, index: int, states: Tensor, modules: Mapping[str, nn.Module], after: Tensor
) -> dict[str, Knowledge | ExpertKnowledge]:
    """Run one layer and watch the inputs of some of its modules.

    Args:
        stack: Layers.
        index: Which layer.
        states: Its inputs, `[n, length, hidden]`.
        modules: Linear modules and banks of experts of the layer by name.
        after: Where its outputs go, as large as `states`; may be `states` itself.

    Returns:
        What is known of every module that ran: its inputs.
    """
    watch = _Watch(modules)
    for place, batch in stack.batches(states):
        watch.half = int(place.start >= len(states) // 2)
        with watch.forward():
            output = stack.run(index, batch)
        after[place] = output  # which the inputs that were watched may be a view of
    return watch.knowledge()


@torch.no_grad()
def layer_backward(
    stack: Stack,
    index: int,
    states: Tensor,
    modules: Mapping[str, nn.Module],
    gradients: Tensor,
) -> dict[str, Knowledge | ExpertKnowledge]:
    """Run one layer forward and backward and watch some of its modules.

    Args:
        stack: Layers.
        index: Which layer.
        states: Its inputs, `[n, length, hidden]`.
        modules: Linear modules and banks of experts of the layer by name.
        gradients: Gradient of the loss with respect to its outputs, as large; replaced by that of its inputs.

    Returns:
        What is known of every module that the loss depends on: inputs, weighed by how much the loss feels what becomes
        of them, and gradients at the outputs.
    """
    watch = _Watch(modules)
    for place, batch in stack.batches(states):
        watch.half = int(place.start >= len(states) // 2)
        with watch.backward():
            gradients[place] = stack.backward(index, batch, gradients[place])
    return watch.knowledge()


@torch.no_grad()
def layer_gradients(
    stack: Stack,
    index: int,
    states: Tensor,
    modules: Mapping[str, nn.Module],
    gradients: Tensor,
    notes: Mapping[str, Note],
) -> None:
    """Run one layer forward and backward and show what passes some of its modules.

    Args:
        stack: Layers.
        index: Which layer.
        states: Its inputs, `[n, length, hidden]`.
        modules: Linear modules and banks of experts of the layer by name.
        gradients: Gradient of the loss with respect to its outputs, as large; replaced by that of its inputs.
        notes: What to do with it, by the same names.
    """
    for place, batch in stack.batches(states):
        with _gradients(modules, notes):
            gradients[place] = stack.backward(index, batch, gradients[place])


class _Watch:
    """Second moments of what passes some modules."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules, self.half = modules, 0
        self._inputs: dict[str, Any] = {}  # a Moment, or ExpertMoments of a bank
        self._outputs: dict[str, Any] = {}

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Watch inputs while one batch runs; modules that are given the same tensors share a moment."""
        given: dict[str, list[tuple[Tensor, ...]]] = {}

        def note(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            given.setdefault(name, []).append(args)

        with _hooks(self.modules, nn.Module.register_forward_pre_hook, note):
            yield
        done: dict[tuple[int, ...], Any] = {}
        for name, calls in given.items():
            same = tuple(id(rows) for rows, *_ in calls)
            if same not in done:
                if name not in self._inputs:
                    self._inputs[name] = self._moment(name, calls[0][0])
                for rows, *ids in calls:
                    self._inputs[name].add(rows, *ids, self.half)
                done[same] = self._inputs[name]
            self._inputs[name] = done[same]

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Watch inputs and gradients of outputs, by the length of the gradient, while a batch runs both ways."""

        notes = {name: functools.partial(self._note, name) for name in self.modules}
        with _gradients(self.modules, notes):
            yield

    def knowledge(self) -> dict[str, Knowledge | ExpertKnowledge]:
        """By name of every module that ran."""
        known: dict[str, Knowledge | ExpertKnowledge] = {}
        for name, inputs in self._inputs.items():
            outputs = self._outputs.get(name)
            if isinstance(inputs, ExpertMoments):
                known[name] = ExpertKnowledge(inputs, outputs)
            else:
                known[name] = Knowledge(inputs, outputs)
        return known

    def _note(self, name: str, rows: Tensor, gradient: Tensor, *ids: Tensor) -> None:
        if name not in self._outputs:
            self._inputs[name], self._outputs[name] = self._moment(name, rows), self._moment(name, gradient)
        gradient = gradient.float()
        root = gradient.norm(dim=-1, keepdim=True).sqrt()
        self._inputs[name].add(rows.float() * root, *ids, self.half)
        self._outputs[name].add(gradient / root.clamp(min=torch.finfo(root.dtype).tiny), *ids, self.half)

    def _moment(self, name: str, rows: Tensor) -> Moment | ExpertMoments:
        module = self.modules[name]
        if isinstance(module, ExpertBank):  # called with the expert of every row besides
            return ExpertMoments(len(module.weight), rows.shape[-1], rows.device)
        return Moment(rows.shape[-1], rows.device)


@contextlib.contextmanager
def _gradients(modules: Mapping[str, nn.Module], notes: Mapping[str, Note]) -> Iterator[None]:
    """Note what passes modules while a batch runs both ways."""

    def attach(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:  # else it depends on nothing that the layers before it do
            rows, ids = args[0].detach(), args[1:]
            output.register_hook(lambda gradient: notes[name](rows, gradient, *ids))

    with _hooks(modules, nn.Module.register_forward_hook, attach):
        yield


@contextlib.contextmanager
def _hooks(modules: Mapping[str, nn.Module], register: Callable[..., Any], hook: Callable[..., None]) -> Iterator[None]:
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(register(module, functools.partial(hook, name)).remove)
        yield


@torch.no_grad()
def _token_gradient(logits: Tensor, draw: torch.Generator) -> Tensor:
    """Gradient of -log p(token) with tokens drawn from p: p less one at the token. As large as `logits`."""
    gradient = torch.softmax(logits, -1)
    below = gradient.cumsum(-1)
    point = torch.rand(below.shape[:-1], generator=draw, device=below.device).unsqueeze(-1)
    token = torch.searchsorted(below, point * below[..., -1:]).clamp(max=below.shape[-1] - 1)
    return gradient.scatter_add_(-1, token, torch.full_like(point, -1))
