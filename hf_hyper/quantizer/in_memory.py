"""Compression of a transformers model that is loaded already."""

from transformers import PreTrainedModel

from hf_hyper.config import HyperConfig
from hf_hyper.errors import ConfigError
from hf_hyper.nn.replace import hyper_modules
from hf_hyper.quantizer.hf_quantizer import HyperHfQuantizer

__all__ = ["compress_model"]


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
    quantizer.plan(model)
    quantizer.compress_loaded(model)
    model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer  # pyright: ignore
    model.is_quantized = True  # pyright: ignore
    model.quantization_method = quantizer.quantization_config.quant_method  # pyright: ignore
    return model
