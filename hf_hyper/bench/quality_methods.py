"""The methods of `bench.quality`: which layers they compress, in which variants they run, and ours among them.

Ours are `shift` and `winding`, `HyperConfig(bits=b, hyperfunction=...)` through `from_pretrained`, and `fit`,
`fisher`, `ldlq` and `plain`, which are `shift`, calibrated, with that `rounding` (`plain`: LDLQ as published). Those of
others are in `hf_hyper.bench.peers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_hyper import HyperConfig
from hf_hyper.bench.peers import PEERS, Decoded, Task
from hf_hyper.config import ROUNDINGS
from hf_hyper.errors import ConfigError, HyperError
from hf_hyper.nn import HyperLinear

__all__ = ["CALIBRATED", "METHODS", "OURS", "decoder_linears", "ours", "plan"]

CALIBRATED = ROUNDINGS
"""Methods of this package that see text, by the name of their rounding."""

OURS = ("shift", "winding", *CALIBRATED)
"""Methods of this package."""

METHODS = (*OURS, *PEERS)
"""All methods."""


def decoder_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Linear layers of a model by name, without the output head.

    Raises:
        ConfigError: There are none.
    """
    head = model.get_output_embeddings()
    found = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    if not found:
        raise ConfigError(f"{type(model).__name__} has no linear layers to compress; give a decoder made of nn.Linear")
    return found


def plan(
    methods: Sequence[str], bits: Sequence[float], recipes: Sequence[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs of the comparison: method, and `bits` and perhaps `recipe`, which tell its runs apart.

    A peer takes those rates that it has; one with a single variant runs that whatever rates are asked for.

    Raises:
        ConfigError: A method is unknown.
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise ConfigError(f"method {unknown[0]!r} is unknown; choose from {', '.join(METHODS)}")
    for method in methods:
        if method in OURS:
            yield from ((method, {"bits": rate}) for rate in bits)
        elif method.startswith("gguf"):
            for recipe in PEERS[method].variants if recipes is None else recipes:
                yield method, {"bits": int(next(filter(str.isdigit, recipe), 0)), "recipe": recipe}
        else:
            variants = PEERS[method].variants
            chosen = variants if len(variants) == 1 else [f"{rate:g}" for rate in bits if f"{rate:g}" in variants]
            yield from ((method, {"bits": int(width)}) for width in chosen)


def ours(task: Task, method: str, config: HyperConfig) -> Iterator[Decoded]:
    """Every layer from a model compressed while it is loaded.

    Raises:
        HyperError: A layer was left as it is.
    """
    model = AutoModelForCausalLM.from_pretrained(task.model_path, dtype=torch.float32, quantization_config=config)
    for name in task.linears:
        layer = model.get_submodule(name)
        if not isinstance(layer, HyperLinear):
            raise HyperError(
                f"{name} is a {type(layer).__name__} under {method} and the peers compress it; methods would not "
                "be on equal terms: choose a model whose decoder is compressed whole"
            )
        stored = sum(tensor.numel() * tensor.element_size() * 8 for tensor in layer.stored())
        yield name, layer.dequantize(torch.float32), stored
