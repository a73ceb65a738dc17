"""Random signs and a rotation on both sides of a weight matrix.

With S diagonal matrices of signs and R the rotation of `hadamard.py`, a weight W is stored as

    Q = R_out S_out W S_in R_in^T,      so that      W x = S_out R_out^T · Q · (R_in S_in x).

The input side is rotated over its full width (or in `input_blocks` equal parts, where a tensor-parallel cut crosses
it); the output side in blocks of at most 128, so that rows can be cut at block borders. The signs come from
splitmix64, written out here, because a checkpoint must decode the same in ten years.

Source: arXiv 2402.04396 (QuIP#); splitmix64 from Steele, Lea and Flood, OOPSLA 2014.
"""

import functools

import torch
from torch import Tensor

from hf_hyper.rotation.hadamard import hadamard, rotate, unrotate
from hf_hyper.scheme import TensorScheme

__all__ = [
    "output_block",
    "rotate_input",
    "rotate_output",
    "rotate_weight",
    "signs",
    "unrotate_output",
    "unrotate_rows",
]

MAX_OUTPUT_BLOCK = 128
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@functools.lru_cache(maxsize=256)
def signs(seed: int, side: int, count: int) -> Tensor:
    """Signs of one side of a weight matrix.

    Sign i is the top bit of splitmix64's output number i + 1 from the state `seed XOR side · 2^63`.

    Args:
        seed: 64-bit start.
        side: 0 for the input, 1 for the output.
        count: Number of signs.

    Returns:
        `[count]` float32 of +1 (bit 0) and -1 (bit 1), on the CPU.
    """
    state = torch.arange(1, count + 1, dtype=torch.int64, device="cpu") * _signed(_GOLDEN)
    state = state + _signed(seed ^ side << 63)
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shift_right(state, 31)
    return 1.0 - 2.0 * (state < 0).float()


def output_block(scheme: TensorScheme) -> int:
    """Rows mixed together on the output side: the largest power of two up to 128 that divides the padded rows."""
    return min(scheme.padded_out & -scheme.padded_out, MAX_OUTPUT_BLOCK)


def rotate_input(x: Tensor, scheme: TensorScheme) -> Tensor:
    """R_in S_in x, with zeros appended up to the padded width.

    Args:
        x: `[..., in_features]` floating point.
        scheme: Shape, seed and input blocks.

    Returns:
        `[..., padded_in]`, same dtype.
    """
    x = torch.nn.functional.pad(x, (0, scheme.padded_in - scheme.in_features))
    x = x * signs(scheme.seed, 0, scheme.padded_in).to(x.device, x.dtype)
    return rotate(x.unflatten(-1, (scheme.input_blocks, -1))).flatten(-2)


def rotate_output(y: Tensor, scheme: TensorScheme) -> Tensor:
    """R_out S_out y.

    Args:
        y: `[..., out_features]` floating point.
        scheme: Shape and seed.

    Returns:
        `[..., padded_out]`, same dtype.
    """
    y = torch.nn.functional.pad(y, (0, scheme.padded_out - scheme.out_features))
    y = y * signs(scheme.seed, 1, scheme.padded_out).to(y.device, y.dtype)
    return hadamard(y.unflatten(-1, (-1, output_block(scheme)))).flatten(-2)


def unrotate_output(y: Tensor, scheme: TensorScheme) -> Tensor:
    """S_out R_out^T y: the inverse of `rotate_output`, padding dropped.

    Args:
        y: `[..., padded_out]` floating point.
        scheme: Shape and seed.

    Returns:
        `[..., out_features]`, same dtype.
    """
    y = hadamard(y.unflatten(-1, (-1, output_block(scheme)))).flatten(-2)
    y = y * signs(scheme.seed, 1, scheme.padded_out).to(y.device, y.dtype)
    return y[..., : scheme.out_features]


def rotate_weight(weight: Tensor, scheme: TensorScheme) -> Tensor:
    """The matrix Q that stands for `weight` between the two rotations.

    Args:
        weight: `[out_features, in_features]` float32.
        scheme: Shape, seed and input blocks.

    Returns:
        `[padded_out, padded_in]` float32.
    """
    return rotate_output(rotate_input(weight, scheme).T, scheme).T


def unrotate_weight(rotated: Tensor, scheme: TensorScheme) -> Tensor:
    """Inverse of `rotate_weight`: `[padded_out, padded_in]` to `[out_features, in_features]`."""
    return _unrotate_columns(unrotate_output(rotated.T, scheme).T, scheme)


def unrotate_rows(rotated: Tensor, scheme: TensorScheme, rows: Tensor) -> Tensor:
    """Some rows of `unrotate_weight`.

    Args:
        rotated: `[n, padded_in]`, the rows `rows` of the rotated matrix.
        scheme: Shape, seed and input blocks of the whole weight.
        rows: `[n]` int64, whole blocks of `output_block` rows each, in order.

    Returns:
        `[n, in_features]`.
    """
    mixed = hadamard(rotated.T.unflatten(-1, (-1, output_block(scheme)))).flatten(-2)
    side = signs(scheme.seed, 1, scheme.padded_out).to(rotated.device, rotated.dtype)
    return _unrotate_columns((mixed * side[rows]).T, scheme)


def _unrotate_columns(rows: Tensor, scheme: TensorScheme) -> Tensor:
    columns = unrotate(rows.unflatten(-1, (scheme.input_blocks, -1))).flatten(-2)
    columns = columns * signs(scheme.seed, 0, scheme.padded_in).to(rows.device, rows.dtype)
    return columns[:, : scheme.in_features]


def _shift_right(value: Tensor, count: int) -> Tensor:
    return value >> count & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (value >> 63 << 64)
