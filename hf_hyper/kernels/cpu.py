"""CPU implementations on the compiled core; each falls back to the reference where the core does not cover a case."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_hyper import _native
from hf_hyper.hyperfunctions.shift import MULTIPLIER
from hf_hyper.kernels.reference import rotated_matmul
from hf_hyper.rotation.incoherence import unrotate_weight
from hf_hyper.scheme import TILE, TensorScheme

__all__ = ["decode_shift", "matmul_shift"]


def decode_shift(tensors: Mapping[str, Tensor], scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    """The stored weight `[out_features, in_features]` of `shift` with incoherence; see `reference.decode`."""
    weight = unrotate_weight(_rotated(tensors, scheme), scheme)
    return (weight * tensors["out_scale"].float().unsqueeze(1)).to(dtype)


def matmul_shift(x: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """`x @ weight.T` of `shift` with incoherence; see `reference.matmul`."""
    return rotated_matmul(x, _rotated(tensors, scheme), tensors, scheme)


def _rotated(tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """`[padded_out, padded_in]` float32 in the rotated basis."""
    bits = int(scheme.bits)
    tiles = _native.shift_decode(tensors["codes"].reshape(-1, 8 * bits), bits, MULTIPLIER)
    tiles = tiles.view(scheme.padded_out // TILE, scheme.padded_in // TILE, TILE, TILE)
    rows = tiles.transpose(1, 2).reshape(scheme.padded_out, scheme.padded_in)
    return rows * tensors["scale"].float().unsqueeze(1)
