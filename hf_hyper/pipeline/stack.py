"""The repeated layers of a transformer, run one at a time.

Calibration needs the inputs of every layer but must not hold all activations of a model at once. A `Stack` finds the
model's list of layers, records once what each layer is given besides the hidden states (masks, positions), and then
runs any layer alone on any batch of the same shape.

Encoders read sentences as well as pages. A window of theirs holds several texts of different lengths (`pieces`), which
run one after the other and do not see each other.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_hyper.errors import ConfigError
from hf_hyper.kernels.dispatch import has_fast_bfloat16

__all__ = ["Stack", "find_layers", "pieces"]

SHORTEST = 32
"""Tokens of the shortest piece of a window."""

_WAY_OUT = "compress it without calibration"


class Stack:
    """Layers of a model that pass hidden states from one to the next.

    Args:
        model: A model with one list of layers, in evaluation mode; `model(input_ids=...)` runs it.
        windows: `[n, length]` token ids that will be run.
        batch_size: Windows a batch; it divides n.

    Attributes:
        name: Name of the list in the model.
        layers: The list.
        entries: Hidden states that the first layer gets, `[n, length, hidden]`.

    Raises:
        ConfigError: The model has no such list, or its layers depend on more of the text than hidden states.
    """

    def __init__(self, model: nn.Module, windows: Tensor, batch_size: int) -> None:
        self.name, self.layers = find_layers(model)
        self.model, self.batch_size = model, batch_size
        self._window = windows[:1]
        self._pieces = pieces(model, windows.shape[1])
        batches = list(windows.split(batch_size))
        self._outputs: int | None = None
        self._arguments = {part.shape[1]: self._record(part) for part in self._cut(batches[0])}
        if len(batches) > 1:
            for part in self._cut(batches[-1]):
                self._check_constant(part.shape[1], self._record(part))
        self.entries = torch.cat([self._join(map(self._entry, self._cut(batch))) for batch in batches])

    def __len__(self) -> int:
        return len(self.layers)

    def run(self, index: int, states: Tensor) -> Tensor:
        """Hidden states after layer `index`, for one batch.

        Args:
            index: Which layer.
            states: Its inputs, `[batch_size, length, hidden]`.
        """
        return self._join(self._run(index, part) for part in self._cut(states))

    def backward(self, index: int, states: Tensor, gradient: Tensor) -> Tensor:
        """Gradient with respect to the inputs of layer `index`, which is run again.

        Layers in float32 multiply in bfloat16 where that is faster: what is taken from this run, gradients and second
        moments, are sums over many tokens, and the rounding of each averages out.

        Args:
            index: Which layer.
            states: Its inputs, `[batch_size, length, hidden]`.
            gradient: Of the loss with respect to its outputs, as large.

        Returns:
            As large as `states`, same dtype.
        """
        leaf = states.detach().clone().requires_grad_(True)
        faster = leaf.dtype == torch.float32 and has_fast_bfloat16(leaf.device.type)
        with torch.enable_grad(), torch.autocast(leaf.device.type, torch.bfloat16, enabled=faster):
            output = self.run(index, leaf)
        output.backward(gradient)
        assert leaf.grad is not None
        return leaf.grad

    def batches(self, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Batches of `states` `[n, ...]` with their places."""
        for start in range(0, len(states), self.batch_size):
            place = slice(start, start + self.batch_size)
            yield place, states[place]

    def finish(self, states: Tensor) -> Any:
        """Output of the whole model as if `states` `[1, length, hidden]` came out of the last layer.

        Of a window in several pieces, those outputs that have a row for every token.
        """
        found = [self._finish(part, ids) for part, ids in zip(*map(self._cut, (states, self._window)), strict=True)]
        if len(found) == 1:
            return found[0]
        keys = [key for key, value in found[0].items() if isinstance(value, Tensor) and value.ndim == 3]
        return {key: self._join(output[key] for output in found) for key in keys}

    def _cut(self, windows: Tensor) -> Sequence[Tensor]:
        """Pieces of windows `[n, length, ...]`."""
        return windows.split(self._pieces, 1)

    @staticmethod
    def _join(parts: Iterable[Tensor]) -> Tensor:
        """Windows from their pieces."""
        first, *others = parts
        return torch.cat([first, *others], 1) if others else first

    def _run(self, index: int, states: Tensor) -> Tensor:
        """Hidden states after layer `index`, for one piece of every window of a batch."""
        args, kwargs = self._arguments[states.shape[1]][index]
        output = self.layers[index](states, *args, **kwargs)
        return output if self._outputs is None else output[0]

    def _finish(self, states: Tensor, ids: Tensor) -> Any:
        """Output of the whole model for one piece, and token ids of its shape."""

        def skip(*_: Any, **__: Any) -> Any:
            return states if self._outputs is None else (states, *[None] * (self._outputs - 1))

        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(_forward_replaced(layer, skip))
            return self._call(ids)

    def _record(self, batch: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What every layer is called with besides hidden states; how many outputs it returns in a tuple is kept."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outputs: set[int | None] = set()

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not args:
                raise ConfigError(f"{type(module).__name__} gets its hidden states by name, not by place; {_WAY_OUT}")
            seen.append((args[1:], kwargs))
            outputs.add(len(output) if isinstance(output, tuple) else None)

        handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in self.layers]
        try:
            with torch.no_grad():
                self._call(batch)
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) != len(self.layers):
            raise ConfigError(f"{len(seen)} layers of {len(self.layers)} ran, wanted each once; {_WAY_OUT}")
        if len(outputs) != 1:
            raise ConfigError(f"the layers of {self.name} return tuples of different lengths; {_WAY_OUT}")
        self._outputs = outputs.pop()
        return seen

    def _entry(self, batch: Tensor) -> Tensor:
        """Hidden states that the first layer gets."""

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        handle = self.layers[0].register_forward_pre_hook(stop)
        try:
            with torch.no_grad():
                self._call(batch)
        except _Reached as reached:
            return reached.states
        finally:
            handle.remove()
        raise AssertionError("the first layer ran before and runs again")

    def _call(self, windows: Tensor) -> Any:
        cached = hasattr(getattr(self.model, "config", None), "use_cache")
        return self.model(input_ids=windows, **({"use_cache": False} if cached else {}))

    def _check_constant(self, length: int, other: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        for index, (first, second) in enumerate(zip(self._arguments[length], other, strict=True)):
            for one, two in zip(_tensors(first), _tensors(second), strict=True):
                if one.shape != two.shape or not torch.equal(one, two):
                    raise ConfigError(
                        f"layer {self.name}.{index} takes inputs that change with the text besides its hidden states, "
                        f"and calibration runs it alone; {_WAY_OUT}"
                    )


class _Reached(Exception):
    """The first layer was reached with these hidden states."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def pieces(model: nn.Module, length: int) -> list[int]:
    """Lengths of the texts that a window of `length` tokens holds, longest first.

    One for models that write text and for windows of less than two of the shortest; for encoders half of the window,
    half of the rest, and so on.

    Example:
        >>> pieces(nn.Linear(1, 1), 256)
        [256]
    """
    found = []
    if isinstance(model, PreTrainedModel) and not model.can_generate():
        while length >= 2 * SHORTEST:
            found.append(length - length // 2)
            length //= 2
    return [*found, length]


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the layers that calibration goes through.

    Raises:
        ConfigError: The model has none, or several, as encoder-decoders and models of images and text have.
    """
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    ]
    stacks = [(name, module) for name, module in stacks if not any(name.startswith(f"{outer}.") for outer, _ in stacks)]
    if len(stacks) != 1:
        names = f" ({', '.join(name for name, _ in stacks)})" if stacks else ""
        raise ConfigError(
            f"{type(model).__name__} has {len(stacks)} lists of equal layers{names}, wanted one that calibration can "
            f"go through; {_WAY_OUT}"
        )
    return stacks[0]


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _tensors(value[key])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
