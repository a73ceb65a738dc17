"""Products of activations with `winding` weights without incoherence by the compiled core."""

import ctypes

import torch
from torch import Tensor

from hf_hyper._native.arguments import DTYPES, check_contiguous, check_dtype, stored
from hf_hyper._native.library import check, check_range, require, thread_count
from hf_hyper._native.product import multiply
from hf_hyper.errors import ShapeError

MAX_WIDTH = 22
"""Bits of the longest code that the core divides exactly in float32."""


class WindingPlan(ctypes.Structure):
    """What all products with one `winding` weight share: `hyper_winding_plan` of `csrc/hyper.h`.

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        width: Bits of the code of a pair of weights, 1..`MAX_WIDTH`.
        num_points: Points of the orbit.
        num_shells: Shells outside the box.
        direction: Both coordinates of the direction, in units of 2^-32 of a turn.
    """

    out_features: int
    in_features: int

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("num_points", ctypes.c_int32),
        ("num_shells", ctypes.c_int32),
        ("direction", ctypes.c_uint32 * 2),
    )

    def __init__(
        self,
        *,
        out_features: int,
        in_features: int,
        width: int,
        num_points: int,
        num_shells: int,
        direction: tuple[int, int],
    ) -> None:
        check_range("width", width, 1, MAX_WIDTH)
        words = (-(-in_features // 2) * width + 31) // 32
        self.codes_shape = out_features, words
        super().__init__(out_features, in_features, width, num_points, num_shells, (ctypes.c_uint32 * 2)(*direction))
        self.address = ctypes.addressof(self)


def winding_matmul(
    plan: WindingPlan, codes: Tensor, centre: Tensor, shell_side: Tensor, x: Tensor, threads: int | None = None
) -> Tensor:
    """`x @ weight.T` straight from the stored tensors; every 8 tokens decode the weight once.

    Args:
        plan: Shape and constants.
        codes: `[out_features, words of a row]` int32.
        centre: `[2]` float32.
        shell_side: `[num_shells + 1]` float32.
        x: `[tokens, in_features]` float32, bfloat16 or float16.
        threads: Threads to use; `torch.get_num_threads()` unless given. The result does not depend on it.

    Returns:
        `[tokens, out_features]`, dtype of `x`; sums are float32.

    Raises:
        ShapeError: A tensor has another shape than the plan wants.
        ConfigError: A tensor has another dtype or lies on another device.
        KernelUnavailable: There is no compiled core.
    """
    return multiply("winding_matmul", plan, _stored_tensors(plan, codes, centre, shell_side), x, threads)


def winding_matmul_dense(
    plan: WindingPlan, codes: Tensor, centre: Tensor, shell_side: Tensor, x: Tensor, threads: int | None = None
) -> Tensor:
    """`x @ weight.T` for many tokens: every weight is decoded once for up to 512 of them.

    Activations and weights are rounded to bfloat16, sums are float32. Arguments, result and errors are those of
    `winding_matmul`.

    Raises:
        HyperError: `dense_tokens()` is 0.
    """
    return multiply("winding_matmul_dense", plan, _stored_tensors(plan, codes, centre, shell_side), x, threads)


def winding_decode(
    plan: WindingPlan,
    codes: Tensor,
    centre: Tensor,
    shell_side: Tensor,
    first_row: int,
    weights: Tensor,
    threads: int | None = None,
) -> None:
    """Weights of some rows: the numbers of `Winding.decode`, bit for bit, rounded to the dtype of `weights`.

    Args:
        plan: Shape and constants.
        codes: `[out_features, words of a row]` int32, of the whole weight.
        centre: `[2]` float32.
        shell_side: `[num_shells + 1]` float32.
        first_row: First row to decode.
        weights: `[rows, in_features]` float32, bfloat16 or float16, contiguous: receives the rows from `first_row` on.
        threads: Threads to use; `torch.get_num_threads()` unless given.

    Raises:
        ShapeError: A tensor has another shape than the plan wants.
        ConfigError: A dtype, the device, the strides or the range of rows are not supported.
        KernelUnavailable: There is no compiled core.
    """
    library = require()
    tensors = _stored_tensors(plan, codes, centre, shell_side)
    check_range("first_row", first_row, 0, plan.out_features)
    if weights.ndim != 2 or weights.shape[1] != plan.in_features:
        raise ShapeError(f"weights: got shape {list(weights.shape)}, wanted [rows, {plan.in_features}]")
    check_range("rows", len(weights), 0, plan.out_features - first_row)
    check_dtype("weights", weights)
    check_contiguous("weights", weights)
    result = library.hyper_winding_decode(
        plan.address,
        *(tensor.data_ptr() for tensor in tensors),
        first_row,
        len(weights),
        thread_count(threads),
        weights.data_ptr(),
        DTYPES[weights.dtype],
    )
    check(result, "winding_decode")


def _stored_tensors(plan: WindingPlan, codes: Tensor, centre: Tensor, shell_side: Tensor) -> list[Tensor]:
    return [
        stored("codes", codes, plan.codes_shape, torch.int32),
        stored("centre", centre, (2,), torch.float32),
        stored("shell_side", shell_side, (plan.num_shells + 1,), torch.float32),
    ]
