"""Take a model off a quantization grid without changing what it computes.

A model that was read from a quantized file has weights on a grid, and a method whose own grid resembles that one looks
better on it than it is. Between some layers a factor can be moved freely: what one side multiplies the other divides.
Random factors on those channels leave the function as it was and the weights off any grid:

    input_layernorm.weight / s           q, k, v columns * s
    post_attention_layernorm.weight / s  gate, up columns * s
    v rows / s                           o columns * s, once for each query head of the key/value head
    up rows / s                          down columns * s

`python -m hf_hyper.bench.offgrid DST` writes such a twin of SmolLM2-135M-Instruct as a transformers folder. Compare
methods on the twin only. What it leaves as it is: embedding, final norm, q and k rows, gate rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_hyper.errors import ConfigError, HyperError
from hf_hyper.pipeline.gguf import load_gguf
from hf_hyper.pipeline.smollm2 import fetch_smollm2

__all__ = ["main", "take_off_grid"]

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@torch.no_grad()
def take_off_grid(model: PreTrainedModel, seed: int, low: float = 0.8, high: float = 1.25) -> None:
    """Scale channels of a Llama-like model by random factors, in place, so that its function stays the same.

    Factors are uniform in `[low, high)` and depend on the seed and the sizes of the model only. Products are taken in
    float64 and rounded once to the dtype of the weights: logits agree to about 1e-5 in float32, not in bfloat16.

    Args:
        model: A decoder with `model.layers` of the names above; model types llama, mistral, qwen2, qwen3.
        seed: Seed of the factors.
        low: Least factor, above 0.
        high: Greatest factor, at least `low`.

    Raises:
        ConfigError: The model is of another type, or the range of factors is not usable.

    Source: the scale migration of SmoothQuant (arXiv 2211.10438), with factors that are random instead of helpful.
    """
    config = model.config
    if config.model_type not in _MODEL_TYPES:
        raise ConfigError(
            f"model type {config.model_type!r} has no known place for the factors; "
            f"wanted one of {', '.join(_MODEL_TYPES)}"
        )
    if not 0 < low <= high:
        raise ConfigError(f"factors from {low} to {high} cannot be used; wanted 0 < low <= high")
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

    decoder: Any = model.get_decoder()
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = factors(norm.weight.numel())
            _scale(norm.weight, 1 / scale)
            for reader in readers:
                _scale(reader.weight, scale)
        head_dim = attention.head_dim
        groups = attention.o_proj.in_features // attention.v_proj.out_features
        scale = factors(attention.v_proj.out_features)
        _scale_rows(attention.v_proj, 1 / scale)
        # Query head h reads key/value head h // groups.
        _scale(attention.o_proj.weight, scale.view(-1, head_dim).repeat_interleave(groups, dim=0).flatten())
        scale = factors(mlp.up_proj.out_features)
        _scale_rows(mlp.up_proj, 1 / scale)
        _scale(mlp.down_proj.weight, scale)


def main(arguments: list[str] | None = None) -> int:
    """Write the twin of a model to a folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hf_hyper.bench.offgrid", description=take_off_grid.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; must not exist")
    parser.add_argument("--source", help="model folder, Hub id or .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the factors (default: 0)")
    options = parser.parse_args(arguments)
    try:
        _write_twin(options.source or fetch_smollm2(), options.target, options.seed)
    except HyperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.target}: written")
    return 0


def _write_twin(source: str | Path, target: Path, seed: int) -> None:
    """Load in float32, take off the grid, save; `target` appears only when complete."""
    if target.exists():
        raise ConfigError(f"folder {target} exists; remove it or give another name")
    if str(source).endswith(".gguf"):
        model, tokenizer = load_gguf(source)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    take_off_grid(model, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        folder = Path(name) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folder.replace(target)


def _scale(weight: Tensor, factors: Tensor) -> None:
    """Multiply the last axis of `weight` by `factors`, rounding once."""
    weight.copy_(weight.double() * factors.to(weight.device))


def _scale_rows(linear: nn.Linear, factors: Tensor) -> None:
    """Multiply each output of `linear`, its row of weights and its bias, by a factor."""
    _scale(linear.weight.T, factors)
    if linear.bias is not None:
        _scale(linear.bias, factors)


if __name__ == "__main__":
    raise SystemExit(main())
