"""`shift`: orbits of the k-fold doubling map, observed through a multiplier and a sum of bytes.

T is x -> 2^k x mod 1. Written in binary, applying T drops the first k bits of x, so an orbit is a 16-bit window that
slides over a bit string by k bits a weight, and neighbouring weights share all but k bits. One circular string of
256·k bits stands for a tile of 16 x 16 weights:

    string      s s s s s s s s s s s s s s s s s s s s ...      256·k bits, wrapping around
    weight 3          [------ 16 bits ------]                    ends with the k bits of symbol 3 (here k = 2)
    weight 4              [------ 16 bits ------]

The observable multiplies the window by an odd constant modulo 2^32 (a rotation of the circle, as in `winding`) and
adds the four bytes of the product: by the central limit theorem nearly a Gaussian, on the grid of 1021 sums.

Known elsewhere as bitshift-trellis coded quantization: arXiv 2406.11235 (QTIP). The byte-sum observable on one product
follows exllamav3; the constant comes from `hf_hyper.bench.multiplier`.
"""

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_hyper.errors import ConfigError
from hf_hyper.hyperfunctions.base import TensorSpec
from hf_hyper.scheme import TILE, TensorScheme

__all__ = ["MULTIPLIER", "STATE_BITS", "TILE_WEIGHTS", "Shift", "byte_sums", "states", "values"]

STATE_BITS = 16
TILE_WEIGHTS = TILE * TILE
MULTIPLIER = 0x64B5D79F


@functools.cache
def byte_sums(multiplier: int = MULTIPLIER) -> Tensor:
    """Sum of the four bytes of `state · multiplier mod 2^32` for every state: `[65536]` int64, on the CPU."""
    product = torch.arange(1 << STATE_BITS, dtype=torch.int64, device="cpu") * multiplier & 0xFFFFFFFF
    return sum((product >> shift & 0xFF for shift in (8, 16, 24)), product & 0xFF)


@functools.cache
def values(device: torch.device, multiplier: int = MULTIPLIER) -> Tensor:
    """Value of every state, zero mean and unit variance over all states: `[65536]` float32."""
    sums = byte_sums(multiplier).double()
    return ((sums - sums.mean()) / sums.std(correction=0)).float().to(device)


def states(codes: Tensor, bits: int) -> Tensor:
    """The 16-bit window of every weight.

    Args:
        codes: `[..., 8 * bits]` int32, a tile's bit string, most significant bit first.
        bits: Bits per weight, 1 to 8.

    Returns:
        `[..., 256]` int64 in `[0, 65536)`, row-major over the tile.
    """
    length = TILE_WEIGHTS * bits
    start = (torch.arange(1, TILE_WEIGHTS + 1, device=codes.device) * bits - STATE_BITS) % length
    index, offset = start // 32, start % 32
    unsigned = codes.long() & 0xFFFFFFFF
    pair = unsigned[..., index] << 32 | unsigned[..., (index + 1) % (length // 32)]
    return pair >> (64 - STATE_BITS - offset) & ((1 << STATE_BITS) - 1)


class Shift:
    """Member of the table of hyperfunctions; one number stands for a tile of 256 weights.

    Stored tensors, for `out_tiles = padded_out / 16` and `in_tiles = padded_in / 16`:

    - `codes`: `[out_tiles, in_tiles, 8 * bits]` int32, bit strings of the tiles;
    - `scale`: `[padded_out]` float16, least-squares scale of every row.
    """

    name = "shift"
    incoherence = True

    def resolve(self, bits: float, options: Mapping[str, object]) -> tuple[float, tuple[tuple[str, int], ...]]:
        """Round `bits` to the nearest integer from 1 to 8; there are no options."""
        if options:
            raise ConfigError(f"hyperfunction 'shift' has no options, received {sorted(options)}; remove them")
        return float(min(max(int(bits + 0.5), 1), 8)), ()

    def tensors(self, scheme: TensorScheme) -> dict[str, TensorSpec]:
        """Shapes and dtypes of `codes` and `scale`."""
        if scheme.bits not in range(1, 9):
            raise ConfigError(f"shift stores 1 to 8 whole bits per weight, received {scheme.bits}; use resolve()")
        tiles = (scheme.padded_out // TILE, scheme.padded_in // TILE)
        return {
            "codes": TensorSpec((*tiles, 8 * int(scheme.bits)), torch.int32),
            "scale": TensorSpec((scheme.padded_out,), torch.float16),
        }

    def take(
        self, tensors: Mapping[str, Tensor], scheme: TensorScheme, tiles: Tensor
    ) -> tuple[dict[str, Tensor], TensorScheme]:
        """Rows of tiles and their scales; see `base.Hyperfunction.take`."""
        part = dataclasses.replace(scheme, out_features=TILE * len(tiles))
        scale = tensors["scale"].unflatten(0, (-1, TILE))[tiles].flatten()
        return {"codes": tensors["codes"][tiles], "scale": scale}, part

    def decode(self, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
        """`scale[row] · value(state)`, `[padded_out, padded_in]` float32, unpadded without incoherence."""
        codes = tensors["codes"]
        tiles = values(codes.device)[states(codes, int(scheme.bits))]  # [out_tiles, in_tiles, 256]
        rows = tiles.unflatten(-1, (TILE, TILE)).transpose(1, 2).reshape(scheme.padded_out, scheme.padded_in)
        weight = rows * tensors["scale"].float().unsqueeze(1)
        return weight if scheme.incoherence else weight[: scheme.out_features, : scheme.in_features]
