"""Compression of any `torch.nn.Module`, without transformers' loaders: a diffusers UNet, a torchvision net, your own.

    model = hf_hyper.compress_module(model, hf_hyper.HyperConfig(bits=4))
    torch.save({"config": model.hyper_config.to_dict(), "state": model.state_dict()}, path)

    saved = torch.load(path)
    model = hf_hyper.load_module(Net(), saved["state"], saved["config"])

Layers are swapped in place, and only in these classes of `torch.nn` themselves: `Linear`, convolutions and transposed
convolutions, and `Embedding` where asked for; and fused experts of transformers (`nn/experts.py`). Left alone are
normalisations, subclasses with a forward pass of their own, parametrized layers, weights shared by several layers, and
layers too small to gain (see `plan.py`). Layers pruned by `torch.nn.utils.prune` keep their zeros; the pruning becomes
permanent.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from hf_hyper.config import HyperConfig
from hf_hyper.errors import ConfigError, FormatError
from hf_hyper.layout import Layout
from hf_hyper.nn.experts import ExpertBank, join_experts, routers, split_experts
from hf_hyper.nn.replace import hyper_layer, hyper_modules, reshapable, weight_of, weight_shape
from hf_hyper.nn.stored import HyperLayer, layer_specs
from hf_hyper.pipeline.allocate import rates_between
from hf_hyper.pipeline.workers import side_by_side
from hf_hyper.plan import Plan, plan_shape, plan_weight
from hf_hyper.scheme import TensorScheme

__all__ = ["compress_module", "filled", "load_module"]

_Stored = tuple[Plan, dict[str, Tensor]]


@torch.no_grad()
def compress_module(
    module: nn.Module, config: HyperConfig, bits: Mapping[str, float] | None = None, workers: int | None = None
) -> nn.Module:
    """Compress the layers of a module in place.

    Args:
        module: Any module with its weights; changed. Of floating-point dtype, on any device.
        config: How to compress. `modules_to_not_convert` lists names to leave; None leaves nothing out.
        bits: Rates of single layers by name, in the place of `config.bits`; see `pipeline.allocate.spread_bits`.
        workers: Tensors compressed side by side, `torch.get_num_threads()` unless given. The result does not depend
            on it.

    Returns:
        The module itself, or the layer that takes its place where it is a single layer. It carries `hyper_config`, a
        copy of the config with the scheme of every compressed layer, which `load_module` needs.

    Raises:
        ConfigError: The module is compressed already, or there is nothing to compress.
        ShapeError: A weight is not finite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64))
        >>> compress_module(net, HyperConfig(bits=4))[0](torch.randn(1, 16, 4, 4)).shape
        torch.Size([1, 32, 2, 2])
    """
    if any(hyper_modules(module)):
        raise ConfigError("the module holds compressed layers already; start from the original module")
    if config.calibration is not None:
        raise ConfigError(
            "compress_module does not know how this module is run, so it cannot calibrate; leave calibration out, or "
            "use compress_model for a model of transformers"
        )
    made = HyperConfig(**{**config.to_dict(), "tensor_schemes": None})
    split_experts(module)
    try:
        module = _compress_split(module, made, bits, workers)
    finally:
        join_experts(module)
    module.hyper_config = made  # pyright: ignore[reportArgumentType]
    return module


def _compress_split(
    module: nn.Module, made: HyperConfig, bits: Mapping[str, float] | None, workers: int | None
) -> nn.Module:
    chosen = [
        (name, layer)
        for name, layer in _candidates(module, made)
        if should_convert_module(name, made.modules_to_not_convert)
    ]
    layers = dict(chosen)
    sizes = {name: math.prod(weight_shape(layer) or ()) for name, layer in chosen}
    rates = rates_between(made, sizes) if bits is None else bits

    def work(name: str) -> tuple[str, _Stored | None]:
        return name, _stored(name, layers[name], made, rates.get(name, made.bits))

    plans: dict[str, Plan] = {}
    with logging.tqdm(total=len(sizes), desc=f"Compressing to {made.bits:g} bits", unit="tensor") as progress:
        for name, found in side_by_side(sizes, work, workers if _on_cpu(module) else 1):
            progress.update()
            if found is not None:
                plans[name], tensors = found
                layer = filled(name, layers.pop(name), plans[name].scheme, plans[name].layout, tensors)
                module = _put(module, name, layer)
    for name in sizes:  # in the order of the module, whoever was done first
        if name in plans:
            made.record(name, plans[name].scheme, plans[name].layout)
    if not made.tensor_schemes:
        raise ConfigError(
            f"no layer of {type(module).__name__} is left to compress: modules_to_not_convert excludes "
            f"{made.modules_to_not_convert}, and layers too small to gain, or that miss loss_max, stay as they are"
        )
    return module


def load_module(
    module: nn.Module, state_dict: Mapping[str, Tensor], config: HyperConfig | Mapping[str, Any]
) -> nn.Module:
    """A compressed module from a plain one of the same architecture and what was saved.

    Args:
        module: Architecture; its layers are swapped in place and its parameters overwritten.
        state_dict: `state_dict()` of the compressed module.
        config: Its `hyper_config`, or that as the dict that `to_dict()` gives.

    Returns:
        The module itself, or the layer that takes its place where it is a single layer.

    Raises:
        FormatError: Config, tensors and architecture do not fit together.
    """
    config = config if isinstance(config, HyperConfig) else HyperConfig(**config)
    split_experts(module)
    layers = dict(module.named_modules())
    for name in config.tensor_schemes:
        shape = weight_shape(layers[name]) if name in layers else None
        if shape is None:
            raise FormatError(
                f"the config names the compressed layer {name!r}, which {type(module).__name__} does not have; build "
                "the module as it was when it was compressed"
            )
        scheme, layout = config.recorded(name, *shape), config.recorded_layout(name, shape)
        tensors = {key: state_dict.get(f"{name}.{key}" if name else key) for key in layer_specs(scheme, layout)}
        module = _put(module, name, filled(name, layers[name], scheme, layout, tensors))
    join_experts(module)
    missing, unexpected = module.load_state_dict(state_dict, strict=False)
    if missing or unexpected:
        raise FormatError(
            f"the saved tensors do not fit {type(module).__name__}: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}; build the module as it was when it was compressed"
        )
    module.hyper_config = config  # pyright: ignore[reportArgumentType]
    return module


def _candidates(module: nn.Module, config: HyperConfig) -> list[tuple[str, nn.Module]]:
    """Layers with a weight that can be stored and that no other place in the module shares."""
    owners = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    places = Counter(id(m) for _, m in module.named_modules(remove_duplicate=False))
    found, choosers = [], routers(module)
    for name, layer in module.named_modules():
        if name in choosers:
            continue
        if weight_shape(layer) is None or (isinstance(layer, nn.Embedding) and not config.compress_embeddings):
            continue
        parameter = layer._parameters.get("weight")
        if parameter is None:
            parameter = layer._parameters.get("weight_orig")  # pruned by torch.nn.utils.prune
        if parameter is not None and owners[id(parameter)] == 1 and places[id(layer)] == 1:
            found.append((name, layer))
    return found


def _on_cpu(module: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in module.parameters())


def _stored(name: str, layer: nn.Module, config: HyperConfig, bits: float) -> _Stored | None:
    """Plan and tensors of a layer's weight, None where it stays as it is."""
    if "weight_orig" in layer._parameters:
        torch_prune.remove(layer, "weight")
    weight = weight_of(layer)
    own = HyperConfig(**{**config.to_dict(), "tensor_schemes": None, "bits": bits})
    plan = plan_shape(own, tuple(weight.shape), reshapable(layer), experts=isinstance(layer, ExpertBank))
    plan = None if plan is None else plan_weight(own, weight, plan)
    return None if plan is None else (plan, plan.quantize(weight, config.effort, name or "weight"))


def filled(
    name: str, plain: nn.Module, scheme: TensorScheme, layout: Layout, tensors: Mapping[str, Tensor | None]
) -> HyperLayer:
    """The counterpart of a plain layer with stored tensors, and with its bias, dtype and device."""
    weight = plain.get_parameter("weight")
    layer = hyper_layer(plain, scheme, layout, weight.dtype)
    given: dict[str, Tensor] = {}
    for key, spec in layer_specs(scheme, layout).items():
        tensor = tensors[key]
        if tensor is None or tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            found = "missing" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise FormatError(f"{name}.{key} is {found}, wanted {spec.shape} of {spec.dtype}; save the module again")
        given[key] = tensor.to(weight.device)
    layer.store(given)
    if getattr(plain, "bias", None) is not None:
        layer.bias = plain.bias
    return layer


def _put(module: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    if not name:
        return layer
    module.set_submodule(name, layer)
    return module
