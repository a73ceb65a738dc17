"""Swapping linear layers of a model skeleton for `HyperLinear`, and back."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from hf_hyper.nn.linear import HyperLinear
from hf_hyper.scheme import TensorScheme

__all__ = ["hyper_modules", "linear_shape", "plain_layer", "replace", "restore"]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(out_features, in_features)` of a plain linear layer, None for any other module.

    `transformers.Conv1D` (GPT-2) counts: a linear layer whose weight is stored transposed.
    """
    if type(module) is nn.Linear:
        return module.out_features, module.in_features
    if is_transposed(module):
        in_features, out_features = module.get_parameter("weight").shape
        return int(out_features), int(in_features)
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether the module is transformers' `Conv1D`, known by name so that this file needs no transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def replace(
    model: nn.Module, choose: Callable[[str, int, int], TensorScheme | None], *, dtype: torch.dtype, placeholder: bool
) -> dict[str, TensorScheme]:
    """Swap the chosen linear layers for empty `HyperLinear` layers on the meta device.

    Args:
        model: Model skeleton, changed in place.
        choose: Scheme for a module's name and `(out_features, in_features)`, or None to leave it.
        dtype: Dtype of biases and of decoded weights.
        placeholder: Keep a meta parameter `weight` of the original shape, for loaders that compress on the fly.

    Returns:
        Scheme of every swapped module by name, in model order.
    """
    schemes: dict[str, TensorScheme] = {}
    for name, module in list(model.named_modules()):
        shape = linear_shape(module)
        scheme = choose(name, *shape) if shape is not None else None
        if scheme is None:
            continue
        bias = module.bias is not None
        layer = HyperLinear(scheme, bias=bias, dtype=dtype, device="meta", plain=type(module))
        if placeholder:
            empty = torch.empty(module.get_parameter("weight").shape, dtype=dtype, device="meta")
            layer._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
        layer.train(module.training)
        model.set_submodule(name, layer)
        schemes[name] = scheme
    return schemes


def restore(model: nn.Module, dtype: torch.dtype) -> None:
    """Swap every `HyperLinear` back for a plain layer with the decoded weight in `dtype`."""
    for name, layer in list(hyper_modules(model)):
        weight = layer.dequantize(dtype)
        plain = plain_layer(layer, device="meta")
        plain.weight = nn.Parameter(weight.T.contiguous() if layer.transposed else weight)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().to(dtype))
        model.set_submodule(name, plain)


def plain_layer(layer: HyperLinear, device: torch.device | str) -> nn.Module:
    """An uncompressed layer of the class, shape and mode of the one that `layer` replaced, with new parameters."""
    with torch.device(device):
        if layer.transposed:
            plain = layer.plain(layer.out_features, layer.in_features)
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    return plain.to(layer.compute_dtype).train(layer.training)


def hyper_modules(model: nn.Module) -> Iterator[tuple[str, HyperLinear]]:
    """Name and module of every `HyperLinear`, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, HyperLinear):
            yield name, module
