"""What a user names as a model: a Hub id, a local folder or a `.gguf` file."""

import re
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_hyper.errors import ConfigError, HyperError

__all__ = ["is_gguf", "model_class", "read_config"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_gguf(source: str | Path) -> bool:
    """Whether the source is named like a GGUF file."""
    return str(source).lower().endswith(".gguf")


def read_config(source: str | Path) -> PreTrainedConfig:
    """Configuration of a model in a folder or on the Hub.

    Raises:
        ConfigError: The source is neither a model folder nor something that can be a Hub id.
        HyperError: The Hub does not have it, or cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"folder {source} has no config.json; give a folder that save_pretrained wrote")
    elif folder.exists() or not _HUB_ID.fullmatch(str(source)) or str(source).startswith("."):
        raise ConfigError(f"model {str(source)!r} is neither a folder nor a .gguf file nor a Hub id; check the path")
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        raise HyperError(
            f"model {str(source)!r} cannot be read; check the name, the connection and your access ({error})"
        ) from error


def model_class(config: PreTrainedConfig) -> Any:
    """The class that the checkpoint was saved from, so that no part of it is dropped or newly initialised.

    An architecture that transformers does not have by that name loads as a causal language model where there is one,
    else as a bare model.
    """
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
