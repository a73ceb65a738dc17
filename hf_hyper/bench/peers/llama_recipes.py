"""Recipes of llama.cpp with an importance matrix, through `llama_model_quantize` of llama-cpp-python.

The weights go into a GGUF file that says just enough for the recipe to choose types; `llama_model_quantize`, the whole
of the program `llama-quantize`, writes another, and the package `gguf` decodes it. The importance of an input is the
mean of its square over the calibration text, as `llama-imatrix` takes it.

Most types need rows of a multiple of 256. llama.cpp gives other rows a type of blocks of 32 and more bits; `gguf` does
the same. `gguf-wrap` joins as many rows as make up a multiple of 256, so that blocks run on from row to row: more than
llama.cpp offers, but it shows what its types can do on a narrow model.
"""

from __future__ import annotations

import ctypes
import functools
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_hyper.bench.peers.base import Decoded, Task
from hf_hyper.errors import ConfigError, HyperError

__all__ = ["RECIPES", "importance", "llama_recipe"]

RECIPES = ("Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XS", "IQ2_XXS")

_BLOCK = 256


def llama_recipe(task: Task, recipe: str, *, wrap: bool = False) -> Iterator[Decoded]:
    """Every layer under a recipe.

    Args:
        task: The model.
        recipe: From `RECIPES`, or any other that llama.cpp knows.
        wrap: Let blocks run over the ends of rows.

    Raises:
        ConfigError: The model has layers that llama.cpp's names do not cover.
        HyperError: llama.cpp gave up; it prints why.
    """
    from gguf import GGUFReader, dequantize  # pyright: ignore[reportMissingImports]

    stored_names = _stored_names(task)
    joined = {name: _rows_to_join(linear.weight) if wrap else 1 for name, linear in task.linears.items()}
    squares = _importance(task)
    matrix = {stored_names[name]: squares[name].repeat(joined[name]) for name in task.linears}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.gguf", Path(folder) / "target.gguf"
        weights = {
            stored_names[name]: linear.weight.detach().reshape(-1, linear.in_features * joined[name])
            for name, linear in task.linears.items()
        }
        _write(source, task.model, weights)
        _quantize(source, target, recipe, matrix)
        tensors = {tensor.name: tensor for tensor in GGUFReader(target).tensors}
        for name, linear in task.linears.items():
            tensor = tensors[stored_names[name]]
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            yield name, values.view_as(linear.weight), tensor.data.nbytes * 8


@torch.no_grad()
def importance(model: PreTrainedModel, linears: Mapping[str, nn.Linear], windows: Tensor) -> dict[str, Tensor]:
    """Mean square of every input of every layer over a text: `[in_features]` float32 by name."""
    sums = {name: torch.zeros(linear.in_features, dtype=torch.float64) for name, linear in linears.items()}

    def watch(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] += inputs[0].detach().float().square().flatten(0, -2).sum(0).double().cpu()

        return add

    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        for window in windows:
            model(input_ids=window[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / windows.numel()).float() for name, total in sums.items()}


@functools.lru_cache(maxsize=1)
def _importance(task: Task) -> dict[str, Tensor]:
    """The same for all recipes of a task."""
    return importance(task.model, task.linears, task.windows)


def _rows_to_join(weight: Tensor) -> int:
    """Rows whose weights make up whole blocks; 1 where none does, or all: llama.cpp leaves vectors alone."""
    count = _BLOCK // math.gcd(_BLOCK, weight.shape[1])
    return count if weight.shape[0] % count == 0 and weight.shape[0] > count else 1


def _stored_names(task: Task) -> dict[str, str]:
    """llama.cpp's name of every layer's weight."""
    from gguf import MODEL_ARCH, get_tensor_name_map  # pyright: ignore[reportMissingImports]

    known = get_tensor_name_map(MODEL_ARCH.LLAMA, task.model.config.num_hidden_layers)
    names = {name: known.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in task.linears}
    missing = [name for name, stored in names.items() if stored is None]
    if missing:
        raise ConfigError(
            f"{missing[0]} has no name in llama.cpp's Llama; leave gguf out, or choose a Llama-like model"
        )
    return {name: str(stored) for name, stored in names.items()}


def _write(file: Path, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """A GGUF file of float32 weights by name; the figures are those that llama.cpp's recipes ask for."""
    from gguf import GGUFWriter  # pyright: ignore[reportMissingImports]

    config = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, weight in weights.items():
        writer.add_tensor(name, np.ascontiguousarray(weight.float().cpu().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantize(source: Path, target: Path, recipe: str, matrix: Mapping[str, Tensor]) -> None:
    import llama_cpp as library  # pyright: ignore[reportMissingImports]

    wanted = getattr(library, f"LLAMA_FTYPE_MOSTLY_{recipe}", None)
    if wanted is None:
        raise ConfigError(f"recipe {recipe!r} is unknown to llama.cpp; choose from {', '.join(RECIPES)}")
    arrays = {name: values.numpy() for name, values in matrix.items()}
    entry = library.llama_model_imatrix_data
    entries = (entry * (len(arrays) + 1))()  # the last one, without a name, ends the list
    for index, (name, values) in enumerate(arrays.items()):
        pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entries[index] = entry(name.encode(), pointer, values.size)
    parameters = library.llama_model_quantize_default_params()
    parameters.nthread = torch.get_num_threads()
    parameters.ftype = wanted
    parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(entry))
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise HyperError(f"llama.cpp could not write {recipe}; its reason stands above")
