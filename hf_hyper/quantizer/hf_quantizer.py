"""The hooks that transformers calls, and the registration of the quantizer.

On the fly: layers of the skeleton become `HyperLayer`s with a placeholder for the weight; the loader hands every
weight to `HyperQuantize`, one at a time, and puts the returned tensors into the layer. With calibration the weights
are loaded as they are, and compressed when all are there. Loading a compressed folder needs no conversion at all.
"""
# transformers annotates the hooks that plugins override with the types of its own stubs, which return nothing.
# pyright: reportIncompatibleMethodOverride=false, reportPrivateImportUsage=false

import copy
import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from hf_hyper.config import HyperConfig
from hf_hyper.errors import ConfigError
from hf_hyper.layout import Layout
from hf_hyper.nn.experts import join_experts, split_experts
from hf_hyper.nn.replace import hyper_modules, layer_of, original_weight, replace, restore, weight_of
from hf_hyper.nn.stored import layer_specs
from hf_hyper.pipeline.calibrate import compress_loaded
from hf_hyper.pipeline.calibration_text import calibration_windows
from hf_hyper.pipeline.stack import find_layers
from hf_hyper.plan import Plan, plan_weight
from hf_hyper.quantizer.choice import plan_model
from hf_hyper.quantizer.on_load import HyperQuantize, leave_out
from hf_hyper.quantizer.recorded import build_recorded, check_loaded
from hf_hyper.quantizer.sentinel import original_name, sentinel, sentinel_name
from hf_hyper.scheme import TensorScheme

__all__ = ["HyperHfQuantizer", "register"]


class HyperHfQuantizer(HfQuantizer):
    """Compresses while loading, loads compressed folders, saves them with the sentinel.

    Attributes:
        measured: Of every module that was compressed, what `compress_loaded` returns; without calibration
            `relative_error` and `seconds`.
        calibrated: Text, number of tokens, rounding and allocation of the calibration, and its `max_kl` if it has one;
            empty without calibration.
    """

    requires_calibration = False
    quantization_config: HyperConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, quantization_config: HyperConfig, **kwargs: Any) -> None:
        # A copy, because every model records its own schemes in it.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.dtype = torch.float32
        self.measured: dict[str, dict[str, float]] = {}
        self.calibrated: dict[str, str | float] = {}
        self._plans: dict[str, Plan] = {}
        self._on_load: HyperQuantize | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype of the model: compressed layers decode into it."""
        self.dtype = dtype or torch.float32
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            build_recorded(model, config, self.dtype)
            self._mark(model)
            return
        self.plan(model)
        if config.calibration is not None:
            return
        plans = self._plans

        def chosen(name: str, *_: Any) -> tuple[TensorScheme, Layout] | None:
            return (plans[name].scheme, plans[name].layout) if name in plans else None

        split_experts(model)
        for name, layer in replace(model, chosen, dtype=self.dtype, placeholder=True).items():
            config.record(name, layer.scheme, layer.layout)
        join_experts(model)
        self._mark(model)
        self._on_load = HyperQuantize(config, plans)

    def plan(self, model: PreTrainedModel) -> None:
        """Decide from names and shapes what becomes of every weight.

        Raises:
            ConfigError: The model cannot be calibrated, or has nothing to compress.
        """
        config = self.quantization_config
        if config.calibration is not None:
            find_layers(model)  # what cannot be calibrated is refused before weights are read
        config.tensor_schemes = {}
        skipped = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, list(model._keep_in_fp32_modules or ())
        )
        split_experts(model)
        try:
            plans = plan_model(model, config, skipped)
        finally:
            join_experts(model)
        self._plans = {name: plan for name, plan in plans.items() if plan is not None}

    def _mark(self, model: PreTrainedModel) -> None:
        """Tell the loader that compressed layers need no initialisation and that the sentinel is expected."""
        for name, layer in hyper_modules(model):
            for module in (layer, original_weight(model, name)[0]):
                module.__dict__["_is_hf_initialized"] = True
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(rf"^{re.escape(name)}$" for name in {sentinel_name(model), original_name(model)}),
        }

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the loader must hand this checkpoint tensor to `HyperQuantize`."""
        return not self.pre_quantized and layer_of(model, param_name) is not None

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element for placing modules on devices; placeholders vanish, so they count nothing."""
        return 0 if layer_of(model, param_name) is not None else param.element_size()

    def get_quantize_ops(self) -> HyperQuantize:
        """The operation that turns a weight into stored tensors."""
        assert self._on_load is not None, "no layer stands ready to be filled"
        return self._on_load

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Compressed tensors load under their own names: nothing to convert."""
        return weight_conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        if self._on_load is not None:
            done, self._on_load = self._on_load, None
            done.finish()
            self.measured = done.measured
        if config.calibration is not None and not self.pre_quantized:
            self.compress_loaded(model)
            return model
        if not any(hyper_modules(model)):
            raise ConfigError(
                f"no weight meets loss_max {config.loss_max}; raise it or bits, or load without HyperConfig"
            )
        for name, layer in list(hyper_modules(model)):
            owner, key = original_weight(model, name)
            if key in owner._parameters:
                leave_out(model, name, layer)
                del config.tensor_schemes[name]
                continue
            for key, spec in layer_specs(layer.scheme, layer.layout).items():
                parameter = layer.get_parameter(key).requires_grad_(False)
                check_loaded(f"{name}.{key}", parameter, spec)
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
        for name, plan in self._plans.items():
            known = plan_weight(config, weight_of(model.get_submodule(name)), plan)
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
            self.calibrated["allocation"] = "loss" if config.bits_follow_loss else "size"
        self.measured = compress_loaded(
            model,
            plans,
            windows,
            config.effort,
            rounding=config.rounding,
            seed=config.seed,
            average=config.bits if config.bits_follow_loss else None,
            max_kl=config.max_kl,
        )
        for name, layer in hyper_modules(model):
            config.record(name, layer.scheme, layer.layout)
        if config.max_kl is not None:
            self.calibrated["max_kl"] = config.max_kl
            found = [(layer.scheme.bits, layer.layout.num_weights) for _, layer in hyper_modules(model)]
            config.bits = sum(bits * size for bits, size in found) / sum(size for _, size in found)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors to save, the sentinel among them; no metadata, whose order would differ from run to run."""
        return {**model.state_dict(), sentinel_name(model): sentinel()}, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # transformers passes the dtype of the configuration, of which saving leaves the name.
        restore(model, (getattr(torch, dtype) if isinstance(dtype, str) else dtype) or self.dtype)
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


def register() -> None:
    """Make transformers know `quant_method: "hyper"`; calling it again does nothing."""
    if "hyper" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("hyper")(HyperConfig)
    if "hyper" not in AUTO_QUANTIZER_MAPPING:
        register_quantizer("hyper")(HyperHfQuantizer)
