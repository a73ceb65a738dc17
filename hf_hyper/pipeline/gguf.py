"""Read a `.gguf` file as an ordinary transformers model with plain weights.

Transformers does the reading; this module makes the result independent of the file. Some versions keep the blocks
packed or leave a `quantization_config` behind, and some give the tokenizer special tokens other than the file's.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_hyper.errors import ConfigError

__all__ = ["load_gguf"]

_MAGIC = b"GGUF"


def load_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file, every weight unpacked.

    The model carries no trace of the file's quantization: it can be saved, compressed and trained like any other.

    Args:
        path: The `.gguf` file.
        dtype: Dtype of the weights.

    Returns:
        The model in evaluation mode on the CPU, and its tokenizer.

    Raises:
        ConfigError: The file does not exist or is not GGUF.
        ImportError: The package `gguf` is not installed.

    Source: transformers, `from_pretrained(folder, gguf_file=name)`.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"GGUF file {path} does not exist; give the path of a .gguf file")
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ConfigError(f"file {path} begins with {magic!r}, a GGUF file with {_MAGIC!r}; give a .gguf file")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f'reading {path} needs the package `gguf`: pip install "hf-hyper[gguf]"')
    options = {}
    if hasattr(transformers, "GgufConfig"):  # transformers 5.22 on: keeps blocks packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **options)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.config.name_or_path = str(path)
    # The name inside the file; it would be written to every config.json saved from here.
    if hasattr(model.config, "_model_name_or_path"):
        delattr(model.config, "_model_name_or_path")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for name in ("bos_token", "eos_token"):
        index = getattr(model.config, f"{name}_id", None)
        if isinstance(index, int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    return model, tokenizer
