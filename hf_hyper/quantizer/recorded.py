"""Layers of a compressed folder: built with the stored names, shapes and dtypes, so that loading converts nothing."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_hyper.config import HyperConfig
from hf_hyper.errors import FormatError
from hf_hyper.hyperfunctions import TensorSpec
from hf_hyper.layout import Layout
from hf_hyper.nn.experts import join_experts, split_experts
from hf_hyper.nn.replace import replace
from hf_hyper.scheme import TensorScheme

__all__ = ["build_recorded", "check_loaded"]


def build_recorded(model: PreTrainedModel, config: HyperConfig, dtype: torch.dtype) -> None:
    """Swap the layers that a folder has schemes for; afterwards these stand under their names in this model.

    Args:
        model: Skeleton: the class that was saved, its base model, or the base model's class with a head.
        config: From the folder, changed in place.
        dtype: Dtype of biases and of decoded weights.

    Raises:
        FormatError: The skeleton lacks a module that the folder has.
    """
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}  # recorded name -> name in this model

    def choose(name: str, module: nn.Module, shape: tuple[int, ...]) -> tuple[TensorScheme, Layout] | None:
        for recorded in (name, prefix + name, name.removeprefix(prefix)):
            if recorded in config.tensor_schemes:
                found[recorded] = name
                return config.recorded(recorded, *shape), config.recorded_layout(recorded, shape)
        return None

    split_experts(model)
    replace(model, choose, dtype=dtype, placeholder=False)
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


def check_loaded(name: str, parameter: Tensor, spec: TensorSpec) -> None:
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
