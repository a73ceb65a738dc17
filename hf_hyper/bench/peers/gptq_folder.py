"""Reads folders in the GPTQ format, which GPTQModel and AutoRound both write.

A linear layer of `[out, in]` weights in groups of `g` inputs is stored as

    qweight  int32 [in * bits / 32, out]     codes of a column, least significant bit first
    qzeros   int32 [in / g, out * bits / 32] zero points less one, of a row, the same way
    scales   float [in / g, out]
    g_idx    int32 [in]                      group of every input

and its weight is `scales[g] * (code - zero)`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hf_hyper.bench.peers.base import Decoded
from hf_hyper.errors import HyperError

__all__ = ["read_gptq_folder"]

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def read_gptq_folder(folder: Path, names: Collection[str]) -> Iterator[Decoded]:
    """Decoded layers of a folder.

    All tensors of a layer are counted, except `g_idx` where groups follow one another and it says nothing.

    Args:
        folder: With `config.json` and safetensors files.
        names: The linear layers that must be there.

    Raises:
        HyperError: The folder is in another format, or does not quantize one of the layers.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    layout = config.get("checkpoint_format", config.get("packing_format", "gptq"))
    if not str(layout).removeprefix("auto_round:").endswith("gptq"):
        raise HyperError(f"{folder} is in the format {layout!r}, wanted 'gptq'; export it as that")
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), file)
    for name in names:
        if f"{name}.qweight" not in places:
            raise HyperError(f"{folder} does not quantize {name}; methods would not be on equal terms")
        parts = {}
        for part in _PARTS:
            key = f"{name}.{part}"
            if key in places:
                with safe_open(places[key], "pt") as tensors:
                    parts[part] = tensors.get_tensor(key)
        weight, stored = _decode(config["bits"], **parts)
        yield name, weight, stored


def _decode(
    bits: int, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None
) -> tuple[Tensor, int]:
    """Weight `[out, in]` float32 and stored bits of one layer."""
    inputs = qweight.shape[0] * 32 // bits
    in_order = torch.arange(inputs) * scales.shape[0] // inputs
    group = in_order if g_idx is None else g_idx.long()
    counted = [qweight, qzeros, scales, *([] if torch.equal(group, in_order) else [group.int()])]
    codes = _unpack(qweight.T, bits)
    zeros = (_unpack(qzeros, bits) + 1) % 2**bits
    weight = scales.float().T[:, group] * (codes - zeros.T[:, group])
    return weight, sum(tensor.numel() * tensor.element_size() * 8 for tensor in counted)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Codes of every row of 32-bit words, least significant bit first: `[rows, words * 32 / bits]` int32."""
    binary = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32) & 1
    return (binary.reshape(len(words), -1, bits) << torch.arange(bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)
