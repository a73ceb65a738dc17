"""Batch norms and biases of a compressed network, moved to where its layers now are: no labels, no gradient, one pass.

A batch norm divides by statistics of the original layer's outputs; those of the compressed layer differ a little, and
the difference adds up from layer to layer. A few inputs, run through both networks, tell it:

    mean  <-  mean + (mean of the compressed layer's outputs - mean of the original's)
    variance  <-  variance · (their variances' ratio)

Each batch norm is moved before its own output is computed, so that later ones see the corrected network. Only the
difference between the networks enters, so the inputs need not be like those that the network was trained on.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_hyper.errors import ShapeError

__all__ = ["align_batch_norms", "align_bias"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def align_batch_norms(original: nn.Module, compressed: nn.Module, *inputs: Any) -> None:
    """Move the statistics of every batch norm of `compressed`, in place.

    Args:
        original: The network before compression, in evaluation mode.
        compressed: The same after `compress_module`, in evaluation mode.
        inputs: Arguments of one call of either network: one batch, the larger the better.

    Raises:
        ShapeError: The networks do not have the same batch norms.
    """
    before, after = _norms(original), _norms(compressed)
    if before.keys() != after.keys():
        raise ShapeError(
            f"the networks have {len(before)} and {len(after)} batch norms, wanted the same ones; compress a copy "
            "of the original"
        )
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        seen[name] = _moments(x)

    def move(name: str, x: Tensor) -> None:
        norm, (mean, variance) = after[name], _moments(x)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean += mean - seen[name][0]
        norm.running_var *= (variance + norm.eps) / (seen[name][1] + norm.eps)

    for network, norms, act in ((original, before, note), (compressed, after, move)):
        hooks = [norm.register_forward_pre_hook(_hook(act, name)) for name, norm in norms.items()]
        try:
            network(*inputs)
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def align_bias(original: nn.Module, compressed: nn.Module, layer: str, *inputs: Any) -> None:
    """Move the bias of one layer of `compressed`, in place, so that the mean of its outputs is the original's.

    For layers that no batch norm follows: the last one of a network, whose errors nothing corrects any more.

    Args:
        original: The network before compression, in evaluation mode.
        compressed: The same after `compress_module` and `align_batch_norms`, in evaluation mode.
        layer: Name of a linear layer with a bias; features are the last dimension of its output.
        inputs: Arguments of one call of either network.

    Raises:
        ShapeError: The layer has no bias.
    """
    bias = getattr(compressed.get_submodule(layer), "bias", None)
    if bias is None:
        raise ShapeError(f"{layer} has no bias to move; choose a layer with one")
    means: list[Tensor] = []
    for network in (original, compressed):
        hook = network.get_submodule(layer).register_forward_hook(
            lambda _, __, y: means.append(y.flatten(0, -2).mean(0))
        )
        try:
            network(*inputs)
        finally:
            hook.remove()
    bias += means[0] - means[1]


def _hook(act: Callable[[str, Tensor], None], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, arguments: act(name, arguments[0])


def _norms(network: nn.Module) -> dict[str, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]:
    found = {name: module for name, module in network.named_modules() if isinstance(module, _NORMS)}
    return {name: norm for name, norm in found.items() if norm.running_mean is not None}


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel."""
    channels = x.transpose(0, 1).flatten(1)
    return channels.mean(1), channels.var(1, correction=0)
