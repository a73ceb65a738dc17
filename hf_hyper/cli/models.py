"""Loading what a user names as a model, for the commands that run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load", "stored_bytes"]


def load(
    source: str | Path, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Causal language model and tokenizer of a Hub id, folder or `.gguf` file.

    Args:
        source: What the user named.
        dtype: Dtype to compute in; `"auto"` is the checkpoint's, and float32 for `.gguf`.
        device: Where the model goes.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_hyper.pipeline.gguf import load_gguf
    from hf_hyper.pipeline.source import is_gguf, read_config

    if is_gguf(source):
        model, tokenizer = load_gguf(source, torch.float32 if isinstance(dtype, str) else dtype)
    else:
        read_config(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    torch.nn.Module.to(model, device)
    return model.eval(), tokenizer


def stored_bytes(source: str | Path, model: PreTrainedModel) -> int:
    """Size of the weight files that `model` was loaded from, or of its tensors where they are not safetensors."""
    from hf_hyper.errors import FormatError
    from hf_hyper.pipeline.report import summarize
    from hf_hyper.pipeline.source import is_gguf

    if is_gguf(source):
        return Path(source).stat().st_size
    try:
        return summarize(source).size_bytes
    except FormatError:
        return summarize(model).size_bytes
