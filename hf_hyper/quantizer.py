"""transformers' view of the package: a quantizer called `hyper`. No numerics here.

On the fly: linear layers of the skeleton become `HyperLinear` with a placeholder `weight`; the loader hands every
weight to `HyperQuantize`, one at a time, and puts the returned tensors into the layer. Loading a compressed folder
needs no conversion at all: the layers are built with the stored names, shapes and dtypes.

A saved folder carries a sentinel: one extra tensor under the original name of a compressed weight, with a shape that
does not fit. transformers without this package skips unknown quantizers with a warning and would go on with random
weights; the sentinel turns that into an error.
"""
# transformers annotates the hooks that plugins override with the types of its own stubs, which return nothing.
# pyright: reportIncompatibleMethodOverride=false, reportPrivateImportUsage=false

import re
import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils import logging

from hf_hyper import codec
from hf_hyper.config import HyperConfig
from hf_hyper.errors import ConfigError, FormatError
from hf_hyper.kernels import ops
from hf_hyper.nn.linear import HyperLinear
from hf_hyper.nn.replace import hyper_modules, replace, restore
from hf_hyper.scheme import TensorScheme
from hf_hyper.storage.resume import TensorStore

__all__ = ["HyperHfQuantizer", "HyperQuantize", "register"]

logger = logging.get_logger(__name__)

SENTINEL_TEXT = b"Compressed with hf-hyper. To load: pip install hf-hyper, then import hf_hyper first."


class HyperHfQuantizer(HfQuantizer):
    """Compresses while loading, loads compressed folders, saves them with the sentinel.

    Attributes:
        measured: `relative_error` and `seconds` of every module that was compressed on the fly.
    """

    requires_calibration = False
    quantization_config: HyperConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, quantization_config: HyperConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.dtype = torch.float32
        self.progress: Any = None
        self.measured: dict[str, dict[str, float]] = {}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype of the model: compressed layers decode into it."""
        self.dtype = dtype or torch.float32
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            self._build_recorded(model)
            return
        if config.tensor_schemes:
            config.tensor_schemes = {}
        skipped = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, list(model._keep_in_fp32_modules or ())
        )
        tied = {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}

        def choose(name: str, out_features: int, in_features: int) -> TensorScheme | None:
            if not should_convert_module(name, skipped):
                return None
            if name in tied:
                logger.warning(f"{name} stays as it is: its weight is tied to another module's.")
                return None
            return config.scheme(out_features, in_features)

        schemes = replace(model, choose, dtype=self.dtype, placeholder=True)
        if not schemes:
            raise ConfigError(
                f"no linear layer of {type(model).__name__} is left to compress: modules_to_not_convert excludes "
                f"{sorted(skipped)}; shorten that list or load the model without HyperConfig"
            )
        for name, scheme in schemes.items():
            config.record(name, scheme)
        self._mark(model)
        self.progress = logging.tqdm(total=len(schemes), desc=f"Compressing to {config.bits:g} bits", unit="tensor")

    def _build_recorded(self, model: PreTrainedModel) -> None:
        config = self.quantization_config

        def choose(name: str, out_features: int, in_features: int) -> TensorScheme | None:
            if name not in config.tensor_schemes:
                return None
            return config.recorded(name, out_features, in_features)

        schemes = replace(model, choose, dtype=self.dtype, placeholder=False)
        missing = sorted(set(config.tensor_schemes) - set(schemes))
        if missing:
            raise FormatError(
                f"{len(missing)} compressed modules of this folder do not exist in {type(model).__name__}, the first "
                f"is {missing[0]!r}; load the folder with the class it was saved from"
            )
        self._mark(model)

    def _mark(self, model: PreTrainedModel) -> None:
        """Tell the loader that compressed layers need no initialisation and that the sentinel is expected."""
        for _, layer in hyper_modules(model):
            layer.__dict__["_is_hf_initialized"] = True
        sentinel = re.escape(sentinel_name(model))
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            rf"^{sentinel}$",
        }

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the loader must hand this checkpoint tensor to `HyperQuantize`."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, HyperLinear) and name == "weight" and not self.pre_quantized

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element for placing modules on devices; placeholders vanish, so they count nothing."""
        module, name = get_module_from_name(model, param_name)
        return 0 if isinstance(module, HyperLinear) and name == "weight" else param.element_size()

    def get_quantize_ops(self) -> "HyperQuantize":
        """The operation that turns a weight into stored tensors."""
        return HyperQuantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Compressed tensors load under their own names: nothing to convert."""
        return weight_conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.progress is not None:
            self.progress.close()
        for _, layer in hyper_modules(model):
            for parameter in layer.stored():
                parameter.requires_grad_(False)
        return model

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
        """Compress `{name: weight}`; returns `{name of stored tensor: tensor}` for the layer."""
        (value,) = input_dict.values()
        weight: Tensor = value[0] if isinstance(value, list) else value
        name = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(name)
        if layer.transposed:
            weight = weight.T
        started = time.perf_counter()
        tensors = TensorStore.current().get_or_make(
            weight,
            f"{layer.scheme.key},effort={self.hf_quantizer.quantization_config.effort}",
            lambda: codec.quantize(weight, layer.scheme, self.hf_quantizer.quantization_config.effort, name=name),
        )
        self.hf_quantizer.measured[name] = {
            "relative_error": relative_error(weight, tensors, layer.scheme),
            "seconds": time.perf_counter() - started,
        }
        layer._parameters.pop("weight", None)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        self.hf_quantizer.progress.update()
        return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def relative_error(weight: Tensor, tensors: dict[str, Tensor], scheme: TensorScheme) -> float:
    """`||W - W'||² / ||W||²` of a weight and its stored form, 0 for a weight of zeros."""
    decoded = ops.decode([tensors[name] for name in codec.tensor_specs(scheme)], scheme.key, torch.float32)
    largest = weight.abs().amax().float()
    if largest == 0:
        return 0.0
    # Divided first: squares of the largest float32 values overflow.
    unit = weight.float() / largest
    return float((decoded / largest - unit).square().sum() / unit.square().sum())


def sentinel_name(model: PreTrainedModel) -> str:
    """Original weight name of the first compressed module."""
    return f"{next(iter(hyper_modules(model)))[0]}.weight"


def register() -> None:
    """Make transformers know `quant_method: "hyper"`; calling it again does nothing."""
    if "hyper" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("hyper")(HyperConfig)
    if "hyper" not in AUTO_QUANTIZER_MAPPING:
        register_quantizer("hyper")(HyperHfQuantizer)
