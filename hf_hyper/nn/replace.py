"""Swapping layers of a model skeleton for their counterparts with stored weights, and back."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hf_hyper.layout import Layout
from hf_hyper.nn import conv
from hf_hyper.nn.embedding import HyperEmbedding
from hf_hyper.nn.experts import BANKS, FUSED, ExpertBank, HyperExpertBank, HyperExperts, join_experts
from hf_hyper.nn.linear import HyperLinear
from hf_hyper.nn.stored import HyperLayer
from hf_hyper.scheme import TensorScheme

__all__ = [
    "hyper_layer",
    "hyper_modules",
    "layer_of",
    "original_weight",
    "replace",
    "reshapable",
    "restore",
    "weight_of",
    "weight_shape",
]

_CONVOLUTIONS = {
    nn.Conv1d: conv.HyperConv1d,
    nn.Conv2d: conv.HyperConv2d,
    nn.Conv3d: conv.HyperConv3d,
    nn.ConvTranspose1d: conv.HyperConvTranspose1d,
    nn.ConvTranspose2d: conv.HyperConvTranspose2d,
    nn.ConvTranspose3d: conv.HyperConvTranspose3d,
}


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Shape of the weight of a plain layer that can be stored, None for any other module.

    Only the classes of `torch.nn` themselves count: a subclass may use its weight in ways of its own. The weight of
    transformers' `Conv1D` (GPT-2), a linear layer that holds it transposed, counts as `[out_features, in_features]`,
    and fused weights of experts, once they are banks (`split_experts`), as `[experts, out_features, in_features]`.
    """
    if type(module) is ExpertBank:
        return tuple(module.weight.shape)
    if type(module) is nn.Embedding:
        return None if module.max_norm is not None else (module.num_embeddings, module.embedding_dim)
    if type(module) is nn.Linear or type(module) in _CONVOLUTIONS:
        shape = getattr(module, "weight", torch.empty(0)).shape
        return tuple(shape) if len(shape) > 1 else None
    if _is_transposed(module):
        in_features, out_features = module.get_parameter("weight").shape
        return int(out_features), int(in_features)
    return None


def weight_of(module: nn.Module) -> Tensor:
    """Weight of a plain layer in the shape that `weight_shape` gives, detached; a view, never a copy."""
    weight = module.get_parameter("weight").detach()
    return weight.T if _is_transposed(module) else weight


def reshapable(module: nn.Module) -> bool:
    """Whether the stored matrix may have other rows than the weight: for convolutions, which are decoded whole."""
    return type(module) in _CONVOLUTIONS


def _is_transposed(module: nn.Module) -> bool:
    """Whether the module is transformers' `Conv1D`, known by name so that this file needs no transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def hyper_layer(plain: nn.Module, scheme: TensorScheme, layout: Layout, dtype: torch.dtype) -> HyperLayer:
    """The counterpart of a plain layer, empty on the meta device.

    Args:
        plain: A layer for which `weight_shape` gives a shape.
        scheme: How its matrix is stored.
        layout: How its weight becomes that matrix.
        dtype: Dtype of the bias and of the decoded weight.
    """
    if type(plain) in _CONVOLUTIONS:
        layer = _CONVOLUTIONS[type(plain)](plain, scheme, layout, dtype)
    elif isinstance(plain, ExpertBank):
        layer = HyperExpertBank(plain, scheme, layout, dtype)
    elif isinstance(plain, nn.Embedding):
        layer = HyperEmbedding(plain, scheme, layout, dtype)
    else:
        bias = plain.bias is not None
        layer = HyperLinear(scheme, bias=bias, dtype=dtype, device="meta", plain=type(plain), layout=layout)
    return layer.train(plain.training)


def replace(
    model: nn.Module,
    choose: Callable[[str, nn.Module, tuple[int, ...]], tuple[TensorScheme, Layout] | None],
    *,
    dtype: torch.dtype,
    placeholder: bool,
) -> dict[str, HyperLayer]:
    """Swap the chosen layers for empty ones with stored weights on the meta device.

    Args:
        model: Model skeleton, changed in place.
        choose: Scheme and layout for a module's name, itself and the shape of its weight, or None to leave it.
        dtype: Dtype of biases and of decoded weights.
        placeholder: Keep a meta parameter of the original name and shape, for loaders that compress on the fly.

    Returns:
        Every swapped layer by name, in model order.
    """
    layers: dict[str, HyperLayer] = {}
    for name, module in list(model.named_modules()):
        shape = weight_shape(module)
        chosen = choose(name, module, shape) if shape is not None else None
        if chosen is None:
            continue
        layer = hyper_layer(module, *chosen, dtype)
        model.set_submodule(name, layer)
        if placeholder:
            weight = module.get_parameter("weight")
            original = weight.mT if isinstance(layer, HyperExpertBank) and layer.transposed else weight
            empty = torch.empty(original.shape, dtype=dtype, device="meta")
            owner, key = original_weight(model, name)
            owner._parameters[key] = nn.Parameter(empty, requires_grad=False)
        layers[name] = layer
    return layers


def original_weight(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Module and name of the parameter that an uncompressed model has in the place of layer `name`'s stored tensors."""
    layer = model.get_submodule(name)
    if isinstance(layer, ExpertBank):
        owner, _, bank = name.rpartition(".")
        return model.get_submodule(owner), FUSED[bank]
    return layer, "weight"


def layer_of(model: nn.Module, parameter: str) -> tuple[str, HyperLayer] | None:
    """Name and module of the layer that stores a parameter of the uncompressed model, None where none does."""
    name, _, key = parameter.rpartition(".")
    module = model.get_submodule(name)
    if isinstance(module, HyperExperts) and BANKS.get(key) in module._modules:
        name = f"{name}.{BANKS[key]}" if name else BANKS[key]
        module, key = module.get_submodule(BANKS[key]), "weight"
    return (name, module) if isinstance(module, HyperLayer) and key == "weight" else None


def restore(model: nn.Module, dtype: torch.dtype) -> None:
    """Swap every layer with a stored weight back for a plain one with the decoded weight in `dtype`."""
    for name, layer in list(hyper_modules(model)):
        model.set_submodule(name, layer.restored(dtype))
    join_experts(model)


def hyper_modules(model: nn.Module) -> Iterator[tuple[str, HyperLayer]]:
    """Name and module of every layer with a stored weight, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, HyperLayer):
            yield name, module
