"""The repeated layers of a transformer, run one at a time.

Calibration needs the inputs of every layer but must not hold all activations of a model at once. A `Stack` finds the
model's list of layers, records what each layer is given besides the hidden states (masks, positions), and then runs any
layer alone on any batch of the same shape.

Encoders read short texts as well as long ones. A window of theirs holds several texts of different lengths, which run
one after the other and do not see each other.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_hyper.errors import ConfigError
from hf_hyper.kernels.dispatch import has_fast_bfloat16

__all__ = ["Stack", "find_layers", "is_encoder", "text_lengths"]

SHORTEST = 32
"""Tokens below which no text of an encoder's window is cut in two."""

_WAY_OUT = "compress it without calibration"

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""By place and by name, behind the hidden states."""


class Stack:
    """Layers of a model that pass hidden states from one to the next.

    Args:
        model: A model with one list of layers, in evaluation mode; `model(input_ids=...)` runs it.
        windows: `[n, length]` token ids that will be run, of an encoder in texts of `text_lengths`.
        batch_size: Windows a batch; it divides n.

    Attributes:
        name: Name of the list in the model.
        layers: The list.
        entries: Hidden states that the first layer gets, `[n, length, hidden]`; longer than the windows where the model
            fills them up.

    Raises:
        ConfigError: The model has no such list, or its layers depend on more of the text than hidden states.
    """

    def __init__(self, model: nn.Module, windows: Tensor, batch_size: int) -> None:
        self.name, self.layers = find_layers(model)
        self.model, self.batch_size = model, batch_size
        self._window, self._tokens = windows[:1], text_lengths(model, windows.shape[1])
        batches = list(windows.split(batch_size))
        self._arguments, self._outputs = self._record(batches[0])
        if len(batches) > 1:
            self._check_constant(self._record(batches[-1])[0])
        self._lengths = [self._entry(text).shape[1] for text in self._texts(self._window)]
        self.entries = torch.cat([_joined(map(self._entry, self._texts(batch))) for batch in batches])

    def __len__(self) -> int:
        return len(self.layers)

    def run(self, index: int, states: Tensor) -> Tensor:
        """Hidden states after layer `index`, for one batch.

        Args:
            index: Which layer.
            states: Its inputs, `[batch_size, length, hidden]`.
        """
        parts = zip(self._arguments, states.split(self._lengths, 1), strict=True)
        return _joined(self._run_text(index, arguments[index], part) for arguments, part in parts)

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

    def finish(self, states: Tensor) -> dict[str, Tensor]:
        """Outputs of the whole model as if `states` `[1, length, hidden]` came out of the last layer.

        Returns:
            `logits`, `last_hidden_state` or both, `[1, length, ...]`.

        Raises:
            ConfigError: The model has neither for every token.
        """
        parts = zip(states.split(self._lengths, 1), self._texts(self._window), strict=True)
        outputs = [self._finish_text(part, ids) for part, ids in parts]
        found = {}
        for key in ("logits", "last_hidden_state"):
            rows = [output.get(key) for output in outputs]
            if [row.shape[1] for row in rows if isinstance(row, Tensor) and row.ndim == 3] == self._tokens:
                found[key] = _joined(rows)
        if not found:
            raise ConfigError(
                f"{type(self.model).__name__} returns neither logits nor a last hidden state for every token, and "
                f"calibration judges by these; {_WAY_OUT}, or calibrate with rounding='ldlq'"
            )
        return found

    def _texts(self, windows: Tensor) -> Sequence[Tensor]:
        """Token ids `[n, length]`, text by text."""
        return windows.split(self._tokens, 1)

    def _run_text(self, index: int, arguments: _Arguments, states: Tensor) -> Tensor:
        """Hidden states after layer `index`, for one text of every window of a batch."""
        args, kwargs = arguments
        output = self.layers[index](states, *args, **kwargs)
        return output if self._outputs is None else output[0]

    def _finish_text(self, states: Tensor, ids: Tensor) -> Any:
        """Output of the whole model for one text, and token ids of its length."""

        def skip(*_: Any, **__: Any) -> Any:
            return states if self._outputs is None else (states, *[None] * (self._outputs - 1))

        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(_forward_replaced(layer, skip))
            return self._call(ids)

    def _record(self, batch: Tensor) -> tuple[list[list[_Arguments]], int | None]:
        """What every layer is called with besides hidden states, by text; how many outputs it returns in a tuple."""
        found = [self._record_text(text) for text in self._texts(batch)]
        outputs = {count for _, counts in found for count in counts}
        if len(outputs) != 1:
            raise ConfigError(f"the layers of {self.name} return tuples of different lengths; {_WAY_OUT}")
        return [seen for seen, _ in found], outputs.pop()

    def _record_text(self, ids: Tensor) -> tuple[list[_Arguments], set[int | None]]:
        seen: list[_Arguments] = []
        outputs: set[int | None] = set()

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not args:
                raise ConfigError(f"{type(module).__name__} gets its hidden states by name, not by place; {_WAY_OUT}")
            seen.append((args[1:], kwargs))
            outputs.add(len(output) if isinstance(output, tuple) else None)

        handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in self.layers]
        try:
            with torch.no_grad():
                self._call(ids)
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) != len(self.layers):
            raise ConfigError(f"{len(seen)} layers of {len(self.layers)} ran, wanted each once; {_WAY_OUT}")
        return seen, outputs

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

    def _check_constant(self, others: list[list[_Arguments]]) -> None:
        for own, other in zip(self._arguments, others, strict=True):
            for index, (first, second) in enumerate(zip(own, other, strict=True)):
                for one, two in zip(_tensors(first), _tensors(second), strict=True):
                    if one.shape != two.shape or not torch.equal(one, two):
                        raise ConfigError(
                            f"layer {self.name}.{index} takes inputs that change with the text besides its hidden "
                            f"states, and calibration runs it alone; {_WAY_OUT}"
                        )


class _Reached(Exception):
    """The first layer was reached with these hidden states."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def is_encoder(model: nn.Module) -> bool:
    """Whether a model of transformers reads texts and cannot write any."""
    return isinstance(model, PreTrainedModel) and not model.can_generate()


def text_lengths(model: nn.Module, length: int) -> list[int]:
    """Tokens of the texts that a window of `length` tokens holds, longest first: all in one, or of an encoder half of
    the window, half of the rest, and so on.

    Example:
        >>> text_lengths(nn.Linear(1, 1), 256)
        [256]
    """
    found = []
    while is_encoder(model) and length >= 2 * SHORTEST:
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


def _joined(parts: Iterable[Tensor]) -> Tensor:
    """One tensor from those of several texts, `[n, length, ...]`."""
    first, *others = parts
    return torch.cat([first, *others], 1) if others else first


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
