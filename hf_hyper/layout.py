"""How a weight of any shape becomes the matrix that is stored, and back.

A scheme stores a matrix. A weight `[d0, d1, d2, ...]` is read as `d0` rows of `d1·d2·...` columns: that of a linear
layer as it is, that of a convolution with one row an output channel. Three things change that:

- **rows**: another number of rows, the weights in the same order. A depthwise convolution has rows of nine weights;
  each would pay for its own padding and scale.
- **pruned**: only the weights that are not zero are stored, in order, as a matrix of their own; a mask says where they
  stood, so that zeros come back as exact zeros.
- **experts**: the first dimension counts matrices `[d1, d2]` of one scheme, stored one by one: the experts of a layer.

The mask is a list of numbers of `width` bits, the weights to skip before the next one that is kept. The largest number
skips that many and keeps none. With one bit a number this is a plain bitmap; wider ones are shorter where most weights
are zero, within about 15 % of the entropy of the mask:

    weights   0 0 5 0 7 0 0 0 0 0 3          width 2: 3 skips three and keeps nothing
    mask          2   1         3   2
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_hyper.errors import FormatError, ShapeError
from hf_hyper.packing import pack, unpack, words_per_row
from hf_hyper.scheme import TILE, padded

__all__ = ["MASK", "Layout", "Pruned", "mask_entropy", "prune"]

MASK = "mask"
"""Name of the stored tensor that says which weights were kept."""

MAX_MASK_WIDTH = 16
MAX_COLUMNS = 1024
"""Longest row of a matrix of kept weights; its scales then cost 1/32 bit a weight."""


@dataclass(frozen=True)
class Pruned:
    """What a reader needs to know of the mask.

    Attributes:
        kept: Weights that are not zero.
        columns: Columns of the matrix that holds them, row by row; the last row is filled up with zeros.
        mask_width: Bits of one number of the mask.
        mask_codes: Numbers in the mask.
    """

    kept: int
    columns: int
    mask_width: int
    mask_codes: int


@dataclass(frozen=True)
class Layout:
    """Between a weight and its matrix.

    Attributes:
        shape: Shape of the weight, at least two dimensions; a layer that holds the transpose gives the transposed one.
        rows: Rows of the matrix, a divisor of the number of weights; `shape[0]` unless given.
        pruned: Set where only the weights that are not zero are stored, as a matrix of its own shape.
        experts: Set to `shape[0]` where every stored tensor has one more dimension, of that size, in front.
    """

    shape: tuple[int, ...]
    rows: int | None = None
    pruned: Pruned | None = None
    experts: int | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the stored matrix, of every one where there are several."""
        if self.experts is not None:
            return self.shape[1], self.shape[2]
        if self.pruned is not None:
            return -(-self.pruned.kept // self.pruned.columns), self.pruned.columns
        rows = self.rows or self.shape[0]
        return rows, self.num_weights // rows

    @property
    def num_weights(self) -> int:
        """Weights of the layer, zeros among them."""
        return math.prod(self.shape)

    @property
    def plain(self) -> bool:
        """Whether the weight is the matrix itself."""
        return self.pruned is None and self.rows is None and len(self.shape) == 2

    @property
    def mask_words(self) -> int:
        """int32 words of the mask, 0 where there is none."""
        return 0 if self.pruned is None else words_per_row(self.pruned.mask_codes, self.pruned.mask_width)

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """The matrices that are stored: one, or one an expert; each `matrix`, dtype of `weight`."""
        if self.experts is None:
            return [self.to_matrix(weight)]
        self._check(weight)
        return list(weight)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The matrix that is stored where there is one: `matrix`, dtype of `weight`."""
        self._check(weight)
        if self.pruned is None:
            return weight.reshape(self.matrix)
        values = weight[weight != 0]
        if len(values) != self.pruned.kept:
            raise ShapeError(f"weight with {len(values)} nonzeros, wanted {self.pruned.kept}; make the layout from it")
        rows, columns = self.matrix
        return torch.nn.functional.pad(values, (0, rows * columns - len(values))).view(rows, columns)

    def from_matrix(self, matrix: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weight again.

        Args:
            matrix: As `matrix` says.
            mask: `[mask_words]` int32 of a pruned weight.

        Returns:
            `shape`, dtype of `matrix`.

        Raises:
            FormatError: The mask does not keep as many weights as the layout says.
        """
        if self.pruned is None:
            return matrix.reshape(self.shape)
        assert mask is not None
        place = _kept_places(mask, self.pruned)
        if len(place) != self.pruned.kept or (len(place) and int(place[-1]) >= self.num_weights):
            raise FormatError(
                f"mask keeps {len(place)} weights, wanted {self.pruned.kept} of {self.num_weights}; the folder is "
                "damaged: fetch the model again"
            )
        weight = matrix.new_zeros(self.num_weights)
        weight[place] = matrix.flatten()[: len(place)]
        return weight.view(self.shape)

    def fields(self) -> dict[str, Any]:
        """What config.json records of it, besides the shape, which the model knows."""
        fields: dict[str, Any] = {} if self.rows is None else {"rows": self.rows}
        if self.experts is not None:
            fields["experts"] = self.experts
        return fields if self.pruned is None else {**fields, "pruned": dict(vars(self.pruned))}

    @staticmethod
    def from_fields(shape: tuple[int, ...], fields: Mapping[str, Any]) -> "Layout":
        """Layout from its record and the shape of the layer's weight.

        Raises:
            FormatError: The record does not fit the shape.
        """
        rows, pruned, experts = fields.get("rows"), fields.get("pruned"), fields.get("experts")
        wanted = ("kept", "columns", "mask_width", "mask_codes")
        if rows is not None and (not isinstance(rows, int) or rows < 1 or math.prod(shape) % rows):
            raise FormatError(f"rows {rows!r} do not divide {math.prod(shape)} weights; config.json is damaged")
        if experts is not None:
            if rows is not None or pruned is not None or len(shape) != 3 or experts != shape[0]:
                raise FormatError(f"experts {experts!r} do not fit a weight of shape {shape}; config.json is damaged")
            return Layout(shape, experts=experts)
        if pruned is None:
            return Layout(shape, rows)
        if set(pruned) != set(wanted) or any(not isinstance(pruned[name], int) or pruned[name] < 1 for name in wanted):
            raise FormatError(f"pruned is {pruned!r}, wanted positive integers {', '.join(wanted)}; upgrade hf-hyper")
        return Layout(shape, rows, Pruned(**pruned))

    def _check(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.shape:
            raise ShapeError(f"weight of shape {tuple(weight.shape)}, wanted {self.shape}; make the layout from it")


def prune(weight: Tensor) -> tuple[Layout, Tensor]:
    """Layout that keeps the zeros of a weight exactly, and its mask of the least size.

    Args:
        weight: Any shape, at least one element not zero.

    Returns:
        The layout, and the mask as `[mask_words]` int32.
    """
    place = weight.flatten().nonzero().squeeze(1)
    gaps = place.diff(prepend=place.new_full((1,), -1)) - 1
    entries = {width: len(gaps) + int((gaps // _skip(width)).sum()) for width in range(1, MAX_MASK_WIDTH + 1)}
    width = min(entries, key=lambda width: entries[width] * width)
    columns = min(MAX_COLUMNS, padded(math.isqrt(len(place) - 1) + 1), padded(len(place)))
    pruned = Pruned(len(place), max(columns, TILE), width, entries[width])
    skips = gaps // _skip(width)
    numbers = gaps.new_full((entries[width],), _skip(width))
    numbers[(skips + 1).cumsum(0) - 1] = gaps % _skip(width)
    return Layout(tuple(weight.shape), pruned=pruned), pack(numbers, width)


def mask_entropy(layout: Layout) -> float:
    """Bits per weight that any code of the mask needs on average when zeros fall at random: H(kept / weights)."""
    share = 1.0 if layout.pruned is None else layout.pruned.kept / layout.num_weights
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


def _skip(width: int) -> int:
    """The number that skips without keeping; it is as many as are skipped."""
    return (1 << width) - 1


def _kept_places(mask: Tensor, pruned: Pruned) -> Tensor:
    numbers = unpack(mask, pruned.mask_width, pruned.mask_codes)
    keeps = numbers < _skip(pruned.mask_width)
    return ((numbers + keeps).cumsum(0) - 1)[keeps]
