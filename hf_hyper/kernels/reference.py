"""Plain torch for every operator, on any device: the oracle of all tests and the fallback of every kernel."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_hyper import codec, hyperfunctions
from hf_hyper.kernels.experts import by_expert
from hf_hyper.rotation.incoherence import rotate_input, unrotate_output
from hf_hyper.scheme import TensorScheme

__all__ = ["decode", "embedding", "matmul", "matmul_experts", "rotated_matmul"]


def decode(tensors: Mapping[str, Tensor], scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    """The stored weight: `[out_features, in_features]` in `dtype`, computed in float32."""
    return codec.dequantize(tensors, scheme).to(dtype).contiguous()


def embedding(index: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme, dtype: torch.dtype) -> Tensor:
    """Rows of the stored weight, of which only blocks with a row that is asked for are decoded.

    Args:
        index: `[...]` int32 or int64 numbers of rows.
        tensors: Stored tensors of the weight.
        scheme: How they are stored.
        dtype: Floating-point dtype of the result.

    Returns:
        `[..., in_features]`.

    Raises:
        IndexError: A row does not exist.
    """
    wanted, place = index.long().unique(return_inverse=True)
    if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < scheme.out_features:
        wrong = int(wanted[0] if wanted[0] < 0 else wanted[-1])
        raise IndexError(f"row {wrong} of an embedding, wanted 0 to {scheme.out_features - 1}; check the token ids")
    return codec.dequantize_rows(tensors, scheme, wanted).to(dtype)[place]


def matmul(x: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """`x @ weight.T` without ever forming the weight in its own basis.

    Args:
        x: `[..., in_features]` floating point.
        tensors: Stored tensors of the weight.
        scheme: How they are stored.

    Returns:
        `[..., out_features]`, dtype of `x`.
    """
    return rotated_matmul(x, hyperfunctions.get(scheme.hyperfunction).decode(tensors, scheme), tensors, scheme)


def matmul_experts(x: Tensor, ids: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """Every row of `x` times the weight of its expert.

    Args:
        x: `[rows, in_features]` floating point.
        ids: `[rows]` integers, the expert of every row; rows of numbers that are no expert's give zeros.
        tensors: Stored tensors, with a dimension of experts in front.
        scheme: How the weight of every expert is stored.

    Returns:
        `[rows, out_features]`, dtype of `x`.
    """
    return by_expert(matmul)(x, ids, tensors, scheme)


def rotated_matmul(x: Tensor, decoded: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """`x @ weight.T` from the weight in the basis of its codes.

    Everything runs in float32: rounding the rotated activations to bfloat16 as well as the weight would cost more than
    plain bfloat16 arithmetic does, and float16 sums of rotated activations can overflow.
    """
    if not scheme.incoherence:
        return torch.nn.functional.linear(x.float(), decoded).to(x.dtype)
    y = torch.nn.functional.linear(rotate_input(x.float(), scheme), decoded)
    return (unrotate_output(y, scheme) * tensors[codec.OUT_SCALE].float()).to(x.dtype)
