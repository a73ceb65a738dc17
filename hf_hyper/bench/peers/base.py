"""What a peer is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["GROUP_SIZE", "Decoded", "Peer", "Task"]

GROUP_SIZE = 64
"""Weights that share a scale in every peer that leaves it open: common, and divides the widths of small models."""

Decoded: TypeAlias = "tuple[str, Tensor, int]"
"""Name of a linear layer, its decoded weight, the bits stored for it."""


@dataclass(frozen=True, eq=False)
class Task:
    """A model to quantize.

    Attributes:
        model_path: Folder or Hub id of the model.
        model: The same in float32; a peer must leave it as it is.
        linears: The layers to quantize, by name.
        windows: `[n, length]` int64 tokens of calibration text; of one token for peers that see none.
    """

    model_path: str | Path
    model: PreTrainedModel
    linears: Mapping[str, nn.Linear]
    windows: Tensor


@dataclass(frozen=True)
class Peer:
    """A method of another package, or of none.

    Attributes:
        quantize: Decoded layers of a task under one of `variants`.
        variants: Code bits as text, or names of recipes.
        module: What must be importable; None if nothing.
        packages: Distributions whose versions matter.
        calibrated: Whether `quantize` reads the calibration text.
        options: Settings, noted in every row.
    """

    quantize: Callable[[Task, str], Iterator[Decoded]]
    variants: tuple[str, ...]
    module: str | None = None
    packages: tuple[str, ...] = ()
    calibrated: bool = False
    options: Mapping[str, Any] | None = None
