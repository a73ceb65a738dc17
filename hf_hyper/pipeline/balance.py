"""Output channels of equal length before compression, where a batch norm takes the lengths back: no stored bytes.

`winding` has one box per tensor, so all weights of a tensor get errors of one size, and channels with small weights
relatively large ones. Depthwise convolutions suffer most: their channels can differ by factors of a hundred (Nagel et
al., arXiv 1906.04721). A layer followed by a batch norm may have any length for every channel. With the weights w of a
channel and its bias b divided by s,

    mean      <-  mean / s
    variance  <-  variance / s²
    weight    <-  weight · s · sqrt((variance / s² + eps) / (variance + eps))

leave what comes out of the batch norm as it was, eps included, up to rounding. Here s is the length of the channel over
the geometric mean of all lengths of the layer.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from hf_hyper.errors import ShapeError

__all__ = ["balance_channels"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

_Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@torch.no_grad()
def balance_channels(network: nn.Module, *inputs: Any) -> list[str]:
    """Scale the output channels of every layer that a batch norm follows to one length, in place.

    Convolutions and linear layers count whose output is, in one call of the network, the input of one batch norm with
    weights. A layer whose output goes elsewhere too must not be scaled; the outputs of the network tell.

    Args:
        network: Before compression, in evaluation mode.
        inputs: Arguments of one call of the network; few are enough.

    Returns:
        Names of the scaled layers.

    Raises:
        ShapeError: The network's outputs change by more than rounding, or hold no floating-point tensor; it is then as
            it was before.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
        >>> balance_channels(net, torch.randn(1, 3, 8, 8))
        ['0']
        >>> net[0].weight.flatten(1).norm(dim=1).std() < 1e-6
        tensor(True)
    """
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pairs, before = _followed(network, inputs)
    if not before:
        raise ShapeError(
            f"{type(network).__name__} gives no floating-point tensor, wanted one to see that its outputs stay; give "
            "the part of it that does"
        )
    for name, norm in pairs.items():
        _balance(network.get_submodule(name), norm)
    after = _tensors(network(*inputs))
    changes = [((b - a).norm() / a.norm().clamp_min(1e-30)).double() for a, b in zip(before, after, strict=True)]
    change = float(torch.stack(changes).max())  # which a NaN wins
    if not change < torch.finfo(before[0].dtype).eps ** 0.5:
        network.load_state_dict(kept)
        raise ShapeError(
            f"outputs of {type(network).__name__} change by {change:.2g} of their size when channels are scaled, "
            "wanted rounding alone; put the network in evaluation mode, or leave it: a layer's output goes into a "
            "batch norm and elsewhere too"
        )
    return list(pairs)


def _followed(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, _Norm], list[Tensor]]:
    """Batch norm behind every layer that has one, by the layer's name, and the network's outputs."""
    made: dict[int, tuple[str, Tensor]] = {}  # by identity; the tensor is kept so that no other takes its place
    calls: Counter[nn.Module] = Counter()
    found: dict[str, _Norm] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
            calls[layer] += 1
            made[id(output)] = (name, output)

        return hook

    def take(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        calls[norm] += 1
        if id(arguments[0]) in made:
            found[made[id(arguments[0])][0]] = norm  # pyright: ignore[reportArgumentType]

    hooks = []
    for name, module in network.named_modules():
        if type(module) in _LAYERS and module._parameters.get("weight") is not None:
            hooks.append(module.register_forward_hook(note(name)))
        elif isinstance(module, _NORMS) and module.affine and module.running_var is not None:
            hooks.append(module.register_forward_pre_hook(take))
    try:
        outputs = _tensors(network(*inputs))
    finally:
        for hook in hooks:
            hook.remove()
    once = {name: norm for name, norm in found.items() if calls[norm] == calls[network.get_submodule(name)] == 1}
    return once, [output.clone() for output in outputs]


def _balance(layer: nn.Module, norm: _Norm) -> None:
    """Divide every channel of the layer by its length over their geometric mean."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    length = weight.double().flatten(1).norm(dim=1)
    logarithm = length.where(length > 0, 1).log()  # a channel of zeros stays as it is
    typical = logarithm[length > 0].mean()
    factor = (logarithm - typical).where(length > 0, 0).exp()
    weight /= factor.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
    if bias is not None:
        bias /= factor.to(bias.dtype)
    before = variance.double()
    mean.copy_(mean.double() / factor)
    variance.copy_(before / factor.square())
    norm.weight.copy_(norm.weight.double() * factor * ((variance.double() + norm.eps) / (before + norm.eps)).sqrt())


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
