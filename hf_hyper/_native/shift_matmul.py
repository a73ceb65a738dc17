"""Products of activations with `shift` weights, and those weights themselves, by the compiled core."""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_hyper._native.arguments import DTYPES, activations, check_contiguous, check_dtype, stored
from hf_hyper._native.library import check, check_multiplier, check_range, require, thread_count
from hf_hyper._native.product import multiply
from hf_hyper.errors import ConfigError

_MAX_FACTORS = 32


class ShiftPlan(ctypes.Structure):
    """What all products with one `shift` weight share: `hyper_shift_plan` of `csrc/hyper.h`.

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        bits: Bits per weight, 1..8.
        multiplier: Odd 32-bit constant of the observable.
        mean: Mean of the byte sum over all states.
        deviation: Its population standard deviation.
        input_blocks: Parts of the padded input side that are rotated separately.
        output_block: Rows that are rotated together.
        matrices: Square float32 matrices of the cosine transforms of a part of the input side, outermost axis first.
        signs_in: `[padded_in]` float32 of +1 and -1.
        signs_out: `[padded_out]` float32 of +1 and -1.
    """

    out_features: int
    in_features: int

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("multiplier", ctypes.c_uint32),
        ("mean_offset", ctypes.c_float),
        ("inverse_deviation", ctypes.c_float),
        ("input_blocks", ctypes.c_int32),
        ("output_block", ctypes.c_int32),
        ("num_factors", ctypes.c_int32),
        ("factors", ctypes.c_int32 * _MAX_FACTORS),
        ("cosines", ctypes.c_void_p),
        ("scales_in", ctypes.c_void_p),
        ("signs_in", ctypes.c_void_p),
        ("signs_out", ctypes.c_void_p),
        ("sum_weights", ctypes.c_void_p),
    )

    def __init__(
        self,
        *,
        out_features: int,
        in_features: int,
        bits: int,
        multiplier: int,
        mean: float,
        deviation: float,
        input_blocks: int,
        output_block: int,
        matrices: Sequence[Tensor],
        signs_in: Tensor,
        signs_out: Tensor,
    ) -> None:
        check_range("bits", bits, 1, 8)
        check_multiplier(multiplier)
        cosines = torch.cat(
            [torch.zeros(1, dtype=torch.float32, device="cpu"), *(matrix.float().flatten() for matrix in matrices)]
        )[1:]
        self.padded_in, self.padded_out = len(signs_in), len(signs_out)
        width = self.padded_in // input_blocks
        power = width & -width
        # A sum over a Walsh-Hadamard transform is its first input times its size.
        mixed = functools.reduce(
            torch.kron,
            (matrix.double().sum(0) for matrix in matrices),
            torch.ones(1, dtype=torch.float64, device="cpu"),
        )
        weights = mixed.repeat_interleave(width // power // len(mixed)).repeat(input_blocks) * power**0.5
        self._kept = (
            cosines,
            signs_in.float() * power**-0.5,
            (signs_in.float() * 2.0 ** -(power.bit_length() // 2)).bfloat16(),
            signs_out.float().contiguous(),
            (signs_in[::power] * weights).float(),
        )
        self.codes_shape = self.padded_out // 16, self.padded_in // 16, 8 * bits
        factors = [len(matrix) for matrix in matrices]
        super().__init__(
            out_features,
            in_features,
            bits,
            multiplier,
            mean - 510,
            1 / deviation,
            input_blocks,
            output_block,
            len(factors),
            (ctypes.c_int32 * _MAX_FACTORS)(*factors),
            *(tensor.data_ptr() for tensor in self._kept),
        )
        self.address = ctypes.addressof(self)


def shift_matmul(
    plan: ShiftPlan,
    codes: Tensor,
    scale: Tensor,
    out_scale: Tensor,
    x: Tensor,
    *,
    int8: bool = False,
    threads: int | None = None,
) -> Tensor:
    """`x @ weight.T` straight from the stored tensors, rotations included; every 8 tokens decode the weight once.

    Args:
        plan: Shape and constants.
        codes: `[padded_out / 16, padded_in / 16, 8 * bits]` int32.
        scale: `[padded_out]` float16.
        out_scale: `[out_features]` bfloat16.
        x: `[tokens, in_features]` float32, bfloat16 or float16.
        int8: Round rotated activations of a single token to 8 bits per 16 columns, about 0.5 % of error; no effect on
            more. Otherwise those of 16-bit dtypes may be rounded to 16 bits per token and 16 columns, about 2e-5 of
            error; float32 ones stay.
        threads: Threads to use; `torch.get_num_threads()` unless given. The result does not depend on it.

    Returns:
        `[tokens, out_features]`, dtype of `x`.

    Raises:
        ShapeError: A tensor has another shape than the plan wants.
        ConfigError: A tensor has another dtype or lies on another device.
        KernelUnavailable: There is no compiled core.
    """
    return _multiply("shift_matmul", plan, (codes, scale, out_scale), x, threads, int8)


def shift_matmul_dense(
    plan: ShiftPlan,
    codes: Tensor,
    scale: Tensor,
    out_scale: Tensor,
    x: Tensor,
    *,
    int8: bool = False,
    threads: int | None = None,
) -> Tensor:
    """`x @ weight.T` for many tokens: every weight is decoded once for up to 512 of them.

    Rotated activations and decoded byte sums are rounded to bfloat16 or, with `int8`, to 8 bits, activations per token
    and up to 256 columns, about 1 % of error; sums are float32. Arguments, result and errors are those of
    `shift_matmul`.

    Raises:
        HyperError: `dense_tokens()` is 0.
    """
    return _multiply("shift_matmul_dense", plan, (codes, scale, out_scale), x, threads, int8)


def _multiply(
    name: str, plan: ShiftPlan, tensors: tuple[Tensor, Tensor, Tensor], x: Tensor, threads: int | None, *options: bool
) -> Tensor:
    codes, scale, out_scale = tensors
    return multiply(name, plan, (_codes(plan, codes), *_scales(plan, scale, out_scale)), x, threads, *options)


def dense_tokens() -> int:
    """Most tokens for which the dense products are the fastest way; 0 where the machine cannot run them."""
    return require().hyper_dense_tokens()


def shift_rotate(plan: ShiftPlan, x: Tensor, dtype: torch.dtype, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """Activations in the basis of the codes.

    Args:
        plan: Shape and constants.
        x: `[tokens, in_features]` float32, bfloat16 or float16.
        dtype: Of the result: float32 or bfloat16.
        threads: Threads to use; `torch.get_num_threads()` unless given.

    Returns:
        `[tokens, padded_in]` in `dtype`, and `[tokens]` float32: the sum of each token's values before rounding, which
        `shift_finish` wants.

    Raises:
        ShapeError: `x` has another width than the plan.
        ConfigError: A dtype or the device is not supported.
        KernelUnavailable: There is no compiled core.
    """
    library = require()
    x = activations(x, plan.in_features)
    rotated = x.new_empty(x.shape[0], plan.padded_in, dtype=_panel_dtype(dtype))
    sums = x.new_empty(x.shape[0], dtype=torch.float32)
    result = library.hyper_shift_rotate(
        plan.address,
        x.data_ptr(),
        DTYPES[x.dtype],
        x.shape[0],
        thread_count(threads),
        rotated.data_ptr(),
        DTYPES[dtype],
        sums.data_ptr(),
    )
    check(result, "shift_rotate")
    return rotated, sums


def shift_decode_rows(
    plan: ShiftPlan, codes: Tensor, first_tile: int, tiles: int, rows: Tensor, threads: int | None = None
) -> None:
    """Centred byte sums of some output tiles, row-major: weights in the basis of the codes before any scale.

    Args:
        plan: Shape and constants.
        codes: `[padded_out / 16, padded_in / 16, 8 * bits]` int32, of the whole weight.
        first_tile: First output tile.
        tiles: Output tiles.
        rows: `[16 * tiles, padded_in]` float32 or bfloat16, contiguous: receives integers in -510..510, of which
            bfloat16 rounds those beyond 256.
        threads: Threads to use; `torch.get_num_threads()` unless given.

    Raises:
        ShapeError: `codes` or `rows` has another shape than the plan wants.
        ConfigError: A dtype, the device, the strides or the range of tiles are not supported.
        KernelUnavailable: There is no compiled core.
    """
    library = require()
    codes = _codes(plan, codes)
    check_range("first_tile", first_tile, 0, plan.padded_out // 16)
    check_range("tiles", tiles, 0, plan.padded_out // 16 - first_tile)
    stored("rows", rows, (16 * tiles, plan.padded_in), _panel_dtype(rows.dtype))
    check_contiguous("rows", rows)
    result = library.hyper_shift_decode_rows(
        plan.address, codes.data_ptr(), first_tile, tiles, thread_count(threads), rows.data_ptr(), DTYPES[rows.dtype]
    )
    check(result, "shift_decode_rows")


def shift_decode_weight(
    plan: ShiftPlan, codes: Tensor, scale: Tensor, out_scale: Tensor, weight: Tensor, threads: int | None = None
) -> None:
    """The weight that stored tensors stand for, rotated back, in float32 until the last step.

    Args:
        plan: Shape and constants.
        codes: `[padded_out / 16, padded_in / 16, 8 * bits]` int32.
        scale: `[padded_out]` float16.
        out_scale: `[out_features]` bfloat16.
        weight: `[out_features, in_features]` float32, bfloat16 or float16, contiguous: receives the weight.
        threads: Threads to use; `torch.get_num_threads()` unless given. The result does not depend on it.

    Raises:
        ShapeError: A tensor has another shape than the plan wants.
        ConfigError: A tensor has another dtype, device or strides.
        KernelUnavailable: There is no compiled core.
    """
    library = require()
    codes = _codes(plan, codes)
    scale, out_scale = _scales(plan, scale, out_scale)
    check_dtype("weight", weight)
    stored("weight", weight, (plan.out_features, plan.in_features), weight.dtype)
    check_contiguous("weight", weight)
    result = library.hyper_shift_decode_weight(
        plan.address,
        codes.data_ptr(),
        scale.data_ptr(),
        out_scale.data_ptr(),
        thread_count(threads),
        weight.data_ptr(),
        DTYPES[weight.dtype],
    )
    check(result, "shift_decode_weight")


def shift_finish(
    plan: ShiftPlan,
    product: Tensor,
    first_tile: int,
    sums: Tensor,
    scale: Tensor,
    out_scale: Tensor,
    y: Tensor,
    threads: int | None = None,
) -> None:
    """Scales and output rotation for the product of `shift_rotate`'s and `shift_decode_rows`' results.

    Args:
        plan: Shape and constants.
        product: `[tokens, 16 * tiles]` float32 or bfloat16, of whole blocks of the output rotation.
        first_tile: First output tile.
        sums: `[tokens]` float32 from `shift_rotate`.
        scale: `[padded_out]` float16, of the whole weight.
        out_scale: `[out_features]` bfloat16, of the whole weight.
        y: `[tokens, out_features]` float32, bfloat16 or float16, contiguous: receives the columns of these tiles.
        threads: Threads to use; `torch.get_num_threads()` unless given.

    Raises:
        ShapeError: A tensor has another shape than the plan wants.
        ConfigError: A tensor has another dtype, device or strides.
        HyperError: The tiles are not whole blocks of the output rotation.
        KernelUnavailable: There is no compiled core.
    """
    library = require()
    product = stored("product", product, (len(sums), product.shape[-1]), _panel_dtype(product.dtype))
    sums = stored("sums", sums, (len(product),), torch.float32)
    scale, out_scale = _scales(plan, scale, out_scale)
    stored("y", y, (len(product), plan.out_features), y.dtype)
    check_dtype("y", y)
    if product.shape[1] % 16:
        raise ConfigError(f"product: got {product.shape[1]} columns, wanted a multiple of 16")
    check_contiguous("y", y)
    result = library.hyper_shift_finish(
        plan.address,
        product.data_ptr(),
        DTYPES[product.dtype],
        first_tile,
        product.shape[1] // 16,
        sums.data_ptr(),
        scale.data_ptr(),
        out_scale.data_ptr(),
        len(product),
        thread_count(threads),
        y.data_ptr(),
        DTYPES[y.dtype],
    )
    check(result, "shift_finish")


def _codes(plan: ShiftPlan, codes: Tensor) -> Tensor:
    return stored("codes", codes, plan.codes_shape, torch.int32)


def _scales(plan: ShiftPlan, scale: Tensor, out_scale: Tensor) -> tuple[Tensor, Tensor]:
    return (
        stored("scale", scale, (plan.padded_out,), torch.float16),
        stored("out_scale", out_scale, (plan.out_features,), torch.bfloat16),
    )


def _panel_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"panels: got {dtype}, wanted float32 or bfloat16")
    return dtype
