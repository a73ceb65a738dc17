"""How the loss feels the outputs of every linear layer: one backward pass over the calibration text.

The damage of compression is measured by the KL divergence from the original model, whose second derivative is the
Fisher information: the second moment of the gradients of log p(token), with tokens drawn from the model itself. Models
without a vocabulary (encoders) are judged by their last hidden states, and the draw is white noise on these.

Hidden states between layers live in one file in a scratch folder; layers are revisited from the last to the first, each
run again with gradients. At no time do activations of more than one batch of one layer exist.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from hf_hyper.pipeline.stack import Stack
from hf_hyper.rounding import Moment

__all__ = ["layer_gradients", "states_by_layer", "top_gradients"]


def states_by_layer(stack: Stack, scratch: Path) -> Tensor:
    """Hidden states before every layer and after the last one.

    Args:
        stack: Layers and their first inputs.
        scratch: Folder for the file that holds them.

    Returns:
        `[layers + 1, n, length, hidden]` in the dtype of the model, a map of the file.
    """
    shape = (len(stack) + 1, *stack.entries.shape)
    size = torch.Size(shape).numel()
    states = torch.from_file(str(scratch / "states.bin"), shared=True, size=size, dtype=stack.entries.dtype).view(shape)
    states[0] = stack.entries
    with torch.no_grad():
        for index in range(len(stack)):
            for place, batch in stack.batches(states[index]):
                states[index + 1, place] = stack.run(index, batch)
    return states


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
        if isinstance(logits := output.get("logits"), Tensor) and logits.ndim == 3:
            logits = logits.float()
            with torch.no_grad():
                wanted = torch.softmax(logits, -1)  # gradient of -log p(token): p - onehot(token)
                below = wanted.cumsum(-1)
                point = torch.rand(below.shape[:-1], generator=draw, device=below.device).unsqueeze(-1)
                token = torch.searchsorted(below, point * below[..., -1:]).clamp(max=below.shape[-1] - 1)
                wanted.scatter_add_(-1, token, torch.full_like(token, -1, dtype=wanted.dtype))
            logits.backward(wanted)
        else:
            last = output["last_hidden_state"]
            last.backward(torch.randn(last.shape, generator=draw, device=last.device, dtype=last.dtype))
        assert leaf.grad is not None
        gradients[place] = leaf.grad[0]
    return gradients


def layer_gradients(
    stack: Stack, index: int, states: Tensor, gradients: Tensor, modules: dict[str, nn.Module]
) -> dict[str, Moment]:
    """Second moments of the gradients at the outputs of some modules of one layer.

    Args:
        stack: Layers.
        index: Which layer.
        states: Its inputs, `[n, length, hidden]`.
        gradients: Gradient of the loss with respect to its outputs, as large; replaced by that of its inputs.
        modules: Linear modules of the layer by name.

    Returns:
        A moment of width `out_features` for every module that the loss depends on.
    """
    moments: dict[str, Moment] = {}
    half = len(states) // 2

    def watch(name: str, output: Tensor, part: int) -> None:
        def note(gradient: Tensor) -> None:
            if name not in moments:
                moments[name] = Moment(gradient.shape[-1], gradient.device)
            moments[name].add(gradient, part)

        output.register_hook(note)

    for place, batch in stack.batches(states):
        part = int(place.start >= half)
        leaf = batch.clone().requires_grad_(True)
        handles = [
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name, part=part: watch(name, output, part)
            )
            for name, module in modules.items()
        ]
        try:
            stack.run(index, leaf).backward(gradients[place])
        finally:
            for handle in handles:
                handle.remove()
        assert leaf.grad is not None
        gradients[place] = leaf.grad
    return moments
