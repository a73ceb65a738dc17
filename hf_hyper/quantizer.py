"""transformers' view of the package: a quantizer called `hyper`. No numerics here.

On the fly: layers of the skeleton become `HyperLayer`s with a placeholder for the weight; the loader hands every
weight to `HyperQuantize`, one at a time, and puts the returned tensors into the layer. Loading a compressed folder
needs no conversion at all: the layers are built with the stored names, shapes and dtypes.

A saved folder carries a sentinel: one extra tensor under the original name of a compressed weight, with a shape that
does not fit. transformers without this package skips unknown quantizers with a warning and would go on with random
weights; the sentinel turns that into an error.
"""
# transformers annotates the hooks that plugins override with the types of its own stubs, which return nothing.
# pyright: reportIncompatibleMethodOverride=false, reportPrivateImportUsage=false

import copy
import functools
import re
import time
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, revert_weight_conversion
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from hf_hyper.config import FORMAT_VERSION, HyperConfig
from hf_hyper.errors import ConfigError, FormatError, HyperError
from hf_hyper.hyperfunctions import TensorSpec
from hf_hyper.layout import Layout
from hf_hyper.nn.experts import ExpertBank, HyperExpertBank, join_experts, routers, split_experts
from hf_hyper.nn.replace import (
    hyper_modules,
    is_transposed,
    layer_of,
    original_weight,
    replace,
    reshapable,
    restore,
    weight_shape,
)
from hf_hyper.nn.stored import HyperLayer, layer_specs, relative_error
from hf_hyper.pipeline.allocate import rates_between
from hf_hyper.pipeline.calibrate import compress_loaded
from hf_hyper.pipeline.calibration_text import calibration_windows
from hf_hyper.plan import Plan, plan_shape, plan_weight
from hf_hyper.scheme import TensorScheme
from hf_hyper.storage.resume import TensorStore

__all__ = ["HyperHfQuantizer", "HyperQuantize", "compress_model", "register"]

logger = logging.get_logger(__name__)

SENTINEL_TEXT = b"Compressed with hf-hyper. To load: pip install hf-hyper, then import hf_hyper first."


LARGE = 0.02
"""Share of a model's weights in modules of one class from which it is said that they stay as they are."""


class HyperHfQuantizer(HfQuantizer):
    """Compresses while loading, loads compressed folders, saves them with the sentinel.

    Attributes:
        measured: `relative_error` and `seconds` of every module that was compressed on the fly.
        calibrated: Text and number of tokens of the calibration, empty without one.
        failure: First error of a conversion. The loader would collect it in a report and go on; it is raised when
            loading ends instead, and nothing is compressed in between.
    """

    requires_calibration = False
    quantization_config: HyperConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, quantization_config: HyperConfig, **kwargs: Any) -> None:
        # A copy, because every model records its own schemes in it.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.dtype = torch.float32
        self.progress: Any = None
        self.failure: HyperError | None = None
        self.measured: dict[str, dict[str, float]] = {}
        self.calibrated: dict[str, str | int] = {}
        self.plans: dict[str, Plan | None] = {}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype of the model: compressed layers decode into it."""
        self.dtype = dtype or torch.float32
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            self._build_recorded(model)
            return
        self._plan(model)
        if config.calibration is not None:  # the weights are loaded as they are, and compressed when all are there
            return
        plans = self.plans

        def chosen(name: str, *_: Any) -> tuple[TensorScheme, Layout] | None:
            plan = plans.get(name)
            return None if plan is None else (plan.scheme, plan.layout)

        split_experts(model)
        layers = replace(model, chosen, dtype=self.dtype, placeholder=True)
        join_experts(model)
        for name, layer in layers.items():
            config.record(name, layer.scheme, layer.layout)
        self._mark(model)
        self.progress = logging.tqdm(total=len(layers), desc=f"Compressing to {config.bits:g} bits", unit="tensor")

    def _plan(self, model: PreTrainedModel) -> None:
        """Decide from names and shapes what becomes of every weight."""
        split_experts(model)
        try:
            self._plan_layers(model)
        finally:
            join_experts(model)

    def _plan_layers(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        config.tensor_schemes = {}
        skipped = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, list(model._keep_in_fp32_modules or ())
        )
        tied = {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}

        choices: dict[str, functools.partial[Plan | None]] = {}
        choosers = routers(model)
        for name, module in model.named_modules():
            shape = weight_shape(module)
            if shape is None or name in choosers or not _wanted(model, name, skipped):
                continue
            if isinstance(module, nn.Embedding) and not config.compress_embeddings:
                continue
            if name in tied:
                logger.warning(f"{name} stays as it is: its weight is tied to another module's.")
                continue
            bank = isinstance(module, ExpertBank)
            choices[name] = functools.partial(plan_shape, config, shape, reshapable(module), experts=bank)
        self.plans = {name: choose() for name, choose in choices.items()}
        kept = {name: plan.layout.num_weights for name, plan in self.plans.items() if plan is not None}
        for name, bits in rates_between(config, kept).items():
            self.plans[name] = choices[name](bits=bits)
        _say_what_stays(model, skipped)
        if all(plan is None for plan in self.plans.values()):
            raise ConfigError(
                f"no layer of {type(model).__name__} is left to compress: modules_to_not_convert excludes "
                f"{sorted(skipped)}, and layers too small to gain stay as they are; shorten that list or load the "
                "model without HyperConfig"
            )

    def _build_recorded(self, model: PreTrainedModel) -> None:
        config = self.quantization_config

        prefix = f"{model.base_model_prefix}."
        found: dict[str, str] = {}  # recorded name -> name in this model, which may be the base model or have a head

        def choose(name: str, module: nn.Module, shape: tuple[int, ...]) -> tuple[TensorScheme, Layout] | None:
            for recorded in (name, prefix + name, name.removeprefix(prefix)):
                if recorded in config.tensor_schemes:
                    found[recorded] = name
                    return config.recorded(recorded, *shape), config.recorded_layout(recorded, shape)
            return None

        split_experts(model)
        replace(model, choose, dtype=self.dtype, placeholder=False)
        join_experts(model)
        heads = {name for name in config.tensor_schemes if not name.startswith(prefix)}
        loads_base_of_larger = any(recorded != name for recorded, name in found.items())
        missing = sorted(set(config.tensor_schemes) - set(found) - (heads if loads_base_of_larger else set()))
        if missing or not found:
            raise FormatError(
                f"{len(missing)} compressed modules of this folder do not exist in {type(model).__name__}, the first "
                f"is {missing[0]!r}; load the folder with the class it was saved from"
            )
        config.tensor_schemes = {name: config.tensor_schemes[recorded] for recorded, name in found.items()}
        self._mark(model)

    def _mark(self, model: PreTrainedModel) -> None:
        """Tell the loader that compressed layers need no initialisation and that the sentinel is expected."""
        for name, layer in hyper_modules(model):
            for module in (layer, original_weight(model, name)[0]):
                module.__dict__["_is_hf_initialized"] = True
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(rf"^{re.escape(name)}$" for name in {sentinel_name(model), _original_name(model)}),
        }

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the loader must hand this checkpoint tensor to `HyperQuantize`."""
        return not self.pre_quantized and layer_of(model, param_name) is not None

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element for placing modules on devices; placeholders vanish, so they count nothing."""
        return 0 if layer_of(model, param_name) is not None else param.element_size()

    def get_quantize_ops(self) -> "HyperQuantize":
        """The operation that turns a weight into stored tensors."""
        return HyperQuantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Compressed tensors load under their own names: nothing to convert."""
        return weight_conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.progress is not None:
            self.progress.close()
            self.progress = None
        if self.failure is not None:
            raise self.failure
        if self.quantization_config.calibration is not None and not self.pre_quantized:
            self.compress_loaded(model)
            return model
        if not any(hyper_modules(model)):
            bound = self.quantization_config.loss_max
            raise ConfigError(f"no weight meets loss_max {bound}; raise it or bits, or load without HyperConfig")
        for name, layer in list(hyper_modules(model)):
            owner, key = original_weight(model, name)
            if key in owner._parameters:
                self._leave_out(model, name, layer)
                continue
            for key, spec in layer_specs(layer.scheme, layer.layout).items():
                parameter = layer.get_parameter(key).requires_grad_(False)
                _check_loaded(f"{name}.{key}", parameter, spec)
        return model

    def compress_loaded(self, model: PreTrainedModel) -> None:
        """Compress a model whose weights are loaded, with knowledge of the calibration text if there is one."""
        away = sorted({str(p.device) for p in model.parameters()} - {str(model.device)})
        if away:
            raise ConfigError(
                f"calibration needs the whole model on one device, found parts on {away} beside {model.device}; load "
                "it without device_map, or with device_map={'': device}"
            )
        split_experts(model)
        try:
            self._compress_split(model)
        finally:
            join_experts(model)

    def _compress_split(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        plans: dict[str, Plan] = {}
        for name, plan in self.plans.items():
            module = model.get_submodule(name)
            weight = module.get_parameter("weight").detach()
            known = None if plan is None else plan_weight(config, weight.T if is_transposed(module) else weight, plan)
            if known is not None:
                plans[name] = known
        if not plans:
            raise ConfigError(
                f"no weight meets loss_max {config.loss_max}; raise it or bits, or leave the model as it is"
            )
        windows = None
        if config.calibration is not None:
            windows = calibration_windows(model, config.calibration, config.calibration_tokens, config.seed)
            text = str(config.to_dict()["calibration"])
            self.calibrated = {"calibration": text, "calibration_tokens": windows.numel(), "rounding": config.rounding}
        self.measured = compress_loaded(
            model, plans, windows, config.effort, rounding=config.rounding, seed=config.seed
        )
        for name, plan in plans.items():
            config.record(name, plan.scheme, plan.layout)

    def _leave_out(self, model: PreTrainedModel, name: str, layer: HyperLayer) -> None:
        """Undo the swap of a layer for which the checkpoint has no weight: it is initialised like any other."""
        owner, key = original_weight(model, name)
        owner._parameters.pop(key)
        plain = layer.plain_layer(layer.stored()[0].device)
        model.set_submodule(name, plain)
        join_experts(model)
        model._init_weights(plain if owner is layer else owner)
        del self.quantization_config.tensor_schemes[name]

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors to save, the sentinel among them; no metadata, whose order would differ from run to run."""
        state = dict(model.state_dict())
        state[sentinel_name(model)] = torch.tensor(list(SENTINEL_TEXT), dtype=torch.uint8)
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        restore(model, dtype or self.dtype)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Compressed models can be saved."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Products are operators with known shapes, so `torch.compile` and compiled static caches see one graph."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: gradients reach the inputs."""
        return True


class HyperQuantize(ConversionOps):
    """Loader operation: one full weight in, the tensors of its scheme out."""

    def __init__(self, hf_quantizer: HyperHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Compress `{name: tensor}`; tensors of other modules, which a split may bring along, pass unchanged.

        Args:
            input_dict: Tensors by target name; a single one may stand under its pattern, a list holds one tensor.
            model: The skeleton that is being filled.
            full_layer_name: Full target name, the first one where there are several.
            missing_keys: Names the loader has not met yet, changed in place.

        Returns:
            Tensors by full name.
        """
        results: dict[str, Tensor] = {}
        for key, value in input_dict.items():
            target = full_layer_name if len(input_dict) == 1 else key
            tensor: Tensor = value[0] if isinstance(value, list) else value
            found = layer_of(model, target)
            if found is None:
                results[target] = tensor
                continue
            name, layer = found
            stored = self._store(name, layer, tensor.mT if layer.transposed_weight else tensor)
            if stored is None:
                results[target] = tensor
                _keep_plain(model, name, layer, missing_keys)
                continue
            results.update({f"{name}.{key}": tensor for key, tensor in stored.items()})
            owner, key = original_weight(model, name)
            owner._parameters.pop(key, None)
            if missing_keys is not None:
                missing_keys.discard(target)
        return results

    def _store(self, name: str, layer: HyperLayer, weight: Tensor) -> dict[str, Tensor] | None:
        """Stored tensors, or None for a weight that is to stay as it is."""
        quantizer, started = self.hf_quantizer, time.perf_counter()
        config, plan = quantizer.quantization_config, quantizer.plans[name]
        assert plan is not None
        try:
            if quantizer.failure is not None:
                return _unfilled(layer)
            plan = plan_weight(config, weight, plan)
            if plan is None:
                del config.tensor_schemes[name]
                quantizer.progress.update()
                return None
            question = (
                f"{plan.scheme.key},effort={config.effort},format={FORMAT_VERSION},hf-hyper={version('hf-hyper')}"
            )
            make = functools.partial(plan.quantize, weight, config.effort, name)
            tensors = TensorStore.current().get_or_make(weight, question, make)
        except HyperError as error:
            quantizer.failure = error
            return _unfilled(layer)
        if plan.layout != layer.layout or plan.scheme != layer.scheme:
            layer.describe(plan.scheme, plan.layout, "meta")
            config.record(name, plan.scheme, plan.layout)
        quantizer.measured[name] = {
            "relative_error": relative_error(
                weight,
                [tensors[key] for key in layer_specs(plan.scheme, plan.layout)],
                plan.scheme.key,
                plan.layout,
            ),
            "seconds": time.perf_counter() - started,
        }
        quantizer.progress.update()
        return tensors


def _keep_plain(model: nn.Module, name: str, layer: HyperLayer, missing_keys: set[str] | None) -> None:
    """Undo the swap of a layer whose weight is to stay as it is; the loader fills in the weight, and the bias unless
    it has been there already.
    """
    owner, key = original_weight(model, name)
    owner._parameters.pop(key, None)
    plain = layer.plain_layer("meta")
    bias = getattr(layer, "bias", None)
    if bias is not None and not bias.is_meta:
        plain.bias = bias
    model.set_submodule(name, plain)
    join_experts(model)
    for key in layer_specs(layer.scheme, layer.layout):
        (missing_keys or set()).discard(f"{name}.{key}")


def _unfilled(layer: HyperLayer) -> dict[str, Tensor]:
    """Something for the loader to place until the failure is raised."""
    specs = layer_specs(layer.scheme, layer.layout)
    return {key: torch.zeros(spec.shape, dtype=spec.dtype) for key, spec in specs.items()}


def _check_loaded(name: str, parameter: Tensor, spec: TensorSpec) -> None:
    """Raise FormatError unless a stored tensor came from the folder with the shape and dtype of its scheme."""
    if parameter.device.type == "meta":  # offloaded: its file is mapped as it is
        return
    if not getattr(parameter, "_is_hf_initialized", False):
        raise FormatError(f"{name} is missing from the folder; the download is incomplete: fetch the model again")
    if parameter.shape != spec.shape or parameter.dtype != spec.dtype:
        raise FormatError(
            f"{name} has shape {tuple(parameter.shape)} and dtype {parameter.dtype}, wanted {spec.shape} and "
            f"{spec.dtype} for the scheme in config.json; the folder is damaged: fetch the model again"
        )


def _say_what_stays(model: PreTrainedModel, skipped: list[str]) -> None:
    """Warn of large weights in classes that cannot be compressed, such as experts fused in a way of their own."""
    total = sum(parameter.numel() for parameter in model.parameters())
    left: dict[str, int] = {}
    for name, module in model.named_modules():
        if weight_shape(module) is None and should_convert_module(name, skipped):
            own = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
            left[type(module).__name__] = left.get(type(module).__name__, 0) + own
    for kind, weights in left.items():
        if weights > LARGE * total:
            logger.warning(f"{kind} stays as it is: {weights / total:.0%} of the weights are in a class of its own.")


def _wanted(model: PreTrainedModel, name: str, skipped: list[str]) -> bool:
    """Whether `modules_to_not_convert` leaves a layer in; a bank of experts answers to its own name, that of its
    parameter and that of the module that holds it.
    """
    names = [name]
    if isinstance(model.get_submodule(name), ExpertBank):
        holder = name.rpartition(".")[0]
        names += [holder, f"{holder}.{original_weight(model, name)[1]}"]
    return all(should_convert_module(one, skipped) for one in names)


def compress_model(model: PreTrainedModel, config: HyperConfig) -> PreTrainedModel:
    """Compress a transformers model that is in memory, in place.

    The same as `from_pretrained(..., quantization_config=config)` for a model that is there already; it saves and
    reloads like one. Any other `torch.nn.Module` goes through `compress_module`.

    Args:
        model: With its weights, on one device.
        config: How to compress. Calibration text is read with the tokenizer beside the model's files.

    Returns:
        The model itself.

    Raises:
        ConfigError: The model is compressed already, or the config does not fit it.
        ShapeError: A weight or an activation is not finite.
    """
    if any(hyper_modules(model)) or getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError("the model is compressed already; start from the original weights")
    quantizer = HyperHfQuantizer(config, pre_quantized=False)
    quantizer.update_dtype(model.dtype)
    quantizer._plan(model)
    quantizer.compress_loaded(model)
    model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer  # pyright: ignore
    model.is_quantized = True  # pyright: ignore
    model.quantization_method = quantizer.quantization_config.quant_method  # pyright: ignore
    return model


def sentinel_name(model: PreTrainedModel) -> str:
    """Name of a tensor that the uncompressed model has in its files and a compressed one has not.

    Experts are fused while they load, and a fused weight has other names in files.
    """
    name, layer = _first_layer(model)
    original = _original_name(model)
    if not isinstance(layer, HyperExpertBank):
        return original
    owner, key = original_weight(model, name)
    fused = torch.empty(getattr(owner, key).shape, device="meta")
    return next(iter(revert_weight_conversion(model, {original: fused})))


def _first_layer(model: PreTrainedModel) -> tuple[str, HyperLayer]:
    """The first compressed layer whose weight is not fused, or the first one."""
    layers = list(hyper_modules(model))
    return next((one for one in layers if not isinstance(one[1], HyperExpertBank)), layers[0])


def _original_name(model: PreTrainedModel) -> str:
    """Name that the weight of this layer has in an uncompressed model."""
    name, layer = _first_layer(model)
    key = original_weight(model, name)[1]
    return f"{name.rpartition('.')[0] if isinstance(layer, HyperExpertBank) else name}.{key}"


def register() -> None:
    """Make transformers know `quant_method: "hyper"`; calling it again does nothing."""
    if "hyper" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("hyper")(HyperConfig)
    if "hyper" not in AUTO_QUANTIZER_MAPPING:
        register_quantizer("hyper")(HyperHfQuantizer)
