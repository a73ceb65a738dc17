"""Loader of the compiled core and typed wrappers over its C interface (`csrc/hyper.h`).

The core is one shared library beside this file, opened with ctypes: no Python headers, so one wheel serves every
Python, and the interpreter lock is released during every call. It is optional. `load` returns None where it is
missing or switched off, `unavailable_reason` says why, and callers fall back to the torch reference.

`HF_HYPER_ISA` chooses an instruction set (`avx512`, `avx2`, `neon`, `scalar`) or switches the core off (`off`).
"""

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_hyper.errors import ConfigError, HyperError, KernelUnavailable, ShapeError

_ABI_VERSION = 1
_TILE_WEIGHTS = 256
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

_POINTER, _INT, _INT64, _UINT32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32
_SIGNATURES = {
    "hyper_abi_version": (_INT, ()),
    "hyper_isa": (ctypes.c_char_p, ()),
    "hyper_set_isa": (_INT, (ctypes.c_char_p,)),
    "hyper_shift_encode": (_INT, (_POINTER, _INT64, _INT, _INT, _UINT32, _INT, _POINTER)),
    "hyper_shift_encode_observable": (_INT, (_POINTER, _INT64, _INT, _INT, _POINTER, _INT, _POINTER)),
    "hyper_shift_decode": (_INT, (_POINTER, _INT64, _INT, _UINT32, _INT, _POINTER)),
    "hyper_shift_matmul": (
        _INT,
        (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT64, _INT, _INT, _POINTER),
    ),
    "hyper_shift_rotate": (_INT, (_POINTER, _POINTER, _INT, _INT64, _INT, _POINTER, _INT, _POINTER)),
    "hyper_shift_decode_rows": (_INT, (_POINTER, _POINTER, _INT64, _INT64, _INT, _POINTER, _INT)),
    "hyper_shift_finish": (
        _INT,
        (_POINTER, _POINTER, _INT, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _INT64, _INT, _POINTER, _INT),
    ),
    "hyper_winding_nearest": (_INT, (_POINTER, _INT64, _POINTER, _INT64, _INT, _POINTER)),
}
_NON_FINITE, _MEMORY = -2, -3
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_FACTORS = 32


@functools.cache
def _find() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and the reason in one sentence."""
    isa = (os.environ.get("HF_HYPER_ISA") or "auto").lower()
    if isa == "off":
        return None, "HF_HYPER_ISA=off switches the compiled core off"
    path = Path(__file__).with_name(f"hyper_core{_SUFFIX}")
    if not path.exists():
        return None, f"{path} does not exist; reinstall hf-hyper with a C++17 compiler at hand"
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be used: {error}"
    version = library.hyper_abi_version()
    if version != _ABI_VERSION:
        return None, f"{path} has interface version {version}, this package wants {_ABI_VERSION}; reinstall hf-hyper"
    if library.hyper_set_isa(isa.encode()) != 0:
        raise ConfigError(
            f"HF_HYPER_ISA: got {isa!r}, which is not an instruction set of this machine and build; "
            f"use one of {', '.join(available_isas(library))}, auto or off"
        )
    return library, None


def load() -> ctypes.CDLL | None:
    """The compiled core, found once per process, or None where it is missing or switched off.

    Raises:
        ConfigError: `HF_HYPER_ISA` names an instruction set that this machine or this build lacks.
    """
    return _find()[0]


def unavailable_reason() -> str | None:
    """Why `load` returns None, in one sentence; None when it does not."""
    return _find()[1]


def isa() -> str | None:
    """Instruction set in use: `avx512`, `avx2`, `neon` or `scalar`; None without the core."""
    library = load()
    return None if library is None else library.hyper_isa().decode()


@functools.cache
def say_if_absent() -> None:
    """Warn, once, that everything runs on the slower torch reference where the core is absent."""
    if load() is None:
        warnings.warn(
            f"hf_hyper runs on its slower torch reference: {unavailable_reason()}. Reinstall hf-hyper where a C++17 "
            "compiler and cmake are available to build the compiled core.",
            RuntimeWarning,
            stacklevel=2,
        )


def available_isas(library: ctypes.CDLL | None = None) -> list[str]:
    """Instruction sets this machine can run with this build, best first."""
    library = library or load()
    if library is None:
        return []
    current = library.hyper_isa()
    found = [name for name in ("avx512", "avx2", "neon", "scalar") if library.hyper_set_isa(name.encode()) == 0]
    library.hyper_set_isa(current)
    return found


def set_isa(name: str) -> None:
    """Uses one instruction set for the rest of the process; no other call may be running.

    Args:
        name: One of `available_isas()`, or `auto` for the best.

    Raises:
        ConfigError: This machine or this build lacks it.
        KernelUnavailable: There is no compiled core.
    """
    if _require().hyper_set_isa(name.encode()) != 0:
        raise ConfigError(f"set_isa: got {name!r}, wanted one of {', '.join(available_isas())} or auto")


def shift_encode(tiles: Tensor, bits: int, survivor_bits: int, multiplier: int, threads: int | None = None) -> Tensor:
    """Closest circular bit string of `shift`, format 1, for every tile (tail-biting Viterbi).

    Args:
        tiles: `[n, 256]` CPU tensor in units of the observable (unit variance); converted to float32.
        bits: Bits per weight, 1..8.
        survivor_bits: Effort, 8..16: about `2^survivor_bits` evaluations a weight, 16 being the full search.
        multiplier: Odd 32-bit constant of the observable.
        threads: Threads to use; `torch.get_num_threads()` unless given. The result does not depend on it.

    Returns:
        `[n, 8 * bits]` int32 words.

    Raises:
        ShapeError: `tiles` is not `[n, 256]`.
        ConfigError: An argument lies outside its range, or a weight is NaN or infinite.
        KernelUnavailable: There is no compiled core.
    """
    library = _require()
    tiles, codes = _prepare_encode(tiles, bits, survivor_bits)
    _check_multiplier(multiplier)
    result = library.hyper_shift_encode(
        tiles.data_ptr(), len(tiles), bits, survivor_bits, multiplier, _threads(threads), codes.data_ptr()
    )
    _check(result, "shift_encode")
    return codes


def shift_encode_observable(
    tiles: Tensor, bits: int, survivor_bits: int, byte_sums: Tensor, threads: int | None = None
) -> Tensor:
    """As `shift_encode`, for any observable given as a table; used by searches for a better one.

    Args:
        tiles: `[n, 256]` CPU tensor in units of the observable.
        bits: Bits per weight, 1..8.
        survivor_bits: Effort, 8..16.
        byte_sums: `[65536]` integers in 0..1020, one per state.
        threads: Threads to use; `torch.get_num_threads()` unless given.

    Returns:
        `[n, 8 * bits]` int32 words.

    Raises:
        ShapeError: `tiles` is not `[n, 256]` or `byte_sums` not `[65536]`.
        ConfigError: An argument lies outside its range, or a weight is NaN or infinite.
        KernelUnavailable: There is no compiled core.
    """
    library = _require()
    tiles, codes = _prepare_encode(tiles, bits, survivor_bits)
    if byte_sums.shape != (65536,):
        raise ShapeError(f"byte_sums: got shape {list(byte_sums.shape)}, wanted [65536]")
    sums = byte_sums.to(torch.uint16).contiguous()
    result = library.hyper_shift_encode_observable(
        tiles.data_ptr(), len(tiles), bits, survivor_bits, sums.data_ptr(), _threads(threads), codes.data_ptr()
    )
    _check(result, "shift_encode_observable")
    return codes


def shift_decode(codes: Tensor, bits: int, multiplier: int, threads: int | None = None) -> Tensor:
    """Weights of `shift` tiles, in units of the observable.

    Args:
        codes: `[n, 8 * bits]` int32 CPU tensor.
        bits: Bits per weight, 1..8.
        multiplier: Odd 32-bit constant of the observable.
        threads: Threads to use; `torch.get_num_threads()` unless given.

    Returns:
        `[n, 256]` float32.

    Raises:
        ShapeError: `codes` is not `[n, 8 * bits]`.
        ConfigError: An argument lies outside its range.
        KernelUnavailable: There is no compiled core.
    """
    library = _require()
    _check_range("bits", bits, 1, 8)
    _check_multiplier(multiplier)
    if codes.ndim != 2 or codes.shape[1] != 8 * bits:
        raise ShapeError(f"codes: got shape {list(codes.shape)}, wanted [n, {8 * bits}] at {bits} bits")
    if codes.dtype != torch.int32 or codes.device.type != "cpu":
        raise ConfigError(f"codes: got {codes.dtype} on {codes.device}, wanted torch.int32 on cpu")
    codes = codes.contiguous()
    tiles = torch.empty(len(codes), _TILE_WEIGHTS, dtype=torch.float32, device="cpu")
    result = library.hyper_shift_decode(
        codes.data_ptr(), len(codes), bits, multiplier, _threads(threads), tiles.data_ptr()
    )
    _check(result, "shift_decode")
    return tiles


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

    _fields_ = (
        ("out_features", _INT64),
        ("in_features", _INT64),
        ("bits", ctypes.c_int32),
        ("multiplier", _UINT32),
        ("mean_offset", ctypes.c_float),
        ("inverse_deviation", ctypes.c_float),
        ("input_blocks", ctypes.c_int32),
        ("output_block", ctypes.c_int32),
        ("num_factors", ctypes.c_int32),
        ("factors", ctypes.c_int32 * _MAX_FACTORS),
        ("cosines", _POINTER),
        ("signs_in", _POINTER),
        ("signs_out", _POINTER),
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
        _check_range("bits", bits, 1, 8)
        _check_multiplier(multiplier)
        cosines = torch.cat(
            [torch.zeros(1, dtype=torch.float32, device="cpu"), *(matrix.float().flatten() for matrix in matrices)]
        )[1:]
        self._kept = cosines, signs_in.float().contiguous(), signs_out.float().contiguous()
        self.padded_in, self.padded_out = len(signs_in), len(signs_out)
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
        int8: Round rotated activations to 8 bits per token and 16 columns, about 0.5 % of error, instead of keeping
            them in float32.
        threads: Threads to use; `torch.get_num_threads()` unless given. The result does not depend on it.

    Returns:
        `[tokens, out_features]`, dtype of `x`.

    Raises:
        ShapeError: A tensor has another shape than the plan wants.
        ConfigError: A tensor has another dtype or lies on another device.
        KernelUnavailable: There is no compiled core.
    """
    library = _require()
    codes = _stored("codes", codes, (plan.padded_out // 16, plan.padded_in // 16, 8 * plan.bits), torch.int32)
    scale = _stored("scale", scale, (plan.padded_out,), torch.float16)
    out_scale = _stored("out_scale", out_scale, (plan.out_features,), torch.bfloat16)
    x = _activations(x, plan)
    y = x.new_empty(x.shape[0], plan.out_features)
    result = library.hyper_shift_matmul(
        plan.address,
        codes.data_ptr(),
        scale.data_ptr(),
        out_scale.data_ptr(),
        x.data_ptr(),
        _DTYPES[x.dtype],
        x.shape[0],
        int8,
        _threads(threads),
        y.data_ptr(),
    )
    _check(result, "shift_matmul")
    return y


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
    library = _require()
    x = _activations(x, plan)
    rotated = x.new_empty(x.shape[0], plan.padded_in, dtype=_panel_dtype(dtype))
    sums = x.new_empty(x.shape[0], dtype=torch.float32)
    result = library.hyper_shift_rotate(
        plan.address,
        x.data_ptr(),
        _DTYPES[x.dtype],
        x.shape[0],
        _threads(threads),
        rotated.data_ptr(),
        _DTYPES[dtype],
        sums.data_ptr(),
    )
    _check(result, "shift_rotate")
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
    library = _require()
    codes = _stored("codes", codes, (plan.padded_out // 16, plan.padded_in // 16, 8 * plan.bits), torch.int32)
    _check_range("first_tile", first_tile, 0, plan.padded_out // 16)
    _check_range("tiles", tiles, 0, plan.padded_out // 16 - first_tile)
    _stored("rows", rows, (16 * tiles, plan.padded_in), _panel_dtype(rows.dtype))
    if not rows.is_contiguous():
        raise ConfigError(f"rows: got strides {rows.stride()}, wanted a contiguous tensor")
    result = library.hyper_shift_decode_rows(
        plan.address, codes.data_ptr(), first_tile, tiles, _threads(threads), rows.data_ptr(), _DTYPES[rows.dtype]
    )
    _check(result, "shift_decode_rows")


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
    library = _require()
    product = _stored("product", product, (len(sums), product.shape[-1]), _panel_dtype(product.dtype))
    sums = _stored("sums", sums, (len(product),), torch.float32)
    scale = _stored("scale", scale, (plan.padded_out,), torch.float16)
    out_scale = _stored("out_scale", out_scale, (plan.out_features,), torch.bfloat16)
    _stored("y", y, (len(product), plan.out_features), y.dtype)
    if product.shape[1] % 16 or not y.is_contiguous() or y.dtype not in _DTYPES:
        raise ConfigError(
            f"shift_finish: got {product.shape[1]} columns, wanted a multiple of 16, and y of {y.dtype} with strides "
            f"{y.stride()}, wanted contiguous float32, bfloat16 or float16"
        )
    result = library.hyper_shift_finish(
        plan.address,
        product.data_ptr(),
        _DTYPES[product.dtype],
        first_tile,
        product.shape[1] // 16,
        sums.data_ptr(),
        scale.data_ptr(),
        out_scale.data_ptr(),
        len(product),
        _threads(threads),
        y.data_ptr(),
        _DTYPES[y.dtype],
    )
    _check(result, "shift_finish")


def winding_nearest(points: Tensor, nodes: Tensor, threads: int | None = None) -> Tensor:
    """Nearest node for every point, by squared distance in float32; the lowest index on a tie.

    Args:
        points: `[n, 2]` CPU tensor of magnitudes up to 1e18; converted to float32.
        nodes: `[m, 2]` CPU tensor, m >= 1; converted to float32.
        threads: Threads to use; `torch.get_num_threads()` unless given. The result does not depend on it.

    Returns:
        `[n]` int32 in `[0, m)`.

    Raises:
        ShapeError: `points` is not `[n, 2]` or `nodes` not `[m, 2]`.
        ConfigError: A coordinate is NaN or infinite, or an argument lies outside its range.
        KernelUnavailable: There is no compiled core.
    """
    library = _require()
    for name, tensor in (("points", points), ("nodes", nodes)):
        if tensor.ndim != 2 or tensor.shape[1] != 2:
            raise ShapeError(f"{name}: got shape {list(tensor.shape)}, wanted [count, 2]")
        if tensor.device.type != "cpu":
            raise ConfigError(f"{name}: got a tensor on {tensor.device}, wanted cpu")
    if len(nodes) == 0:
        raise ShapeError("nodes: got none, wanted at least one")
    points, nodes = points.detach().float().contiguous(), nodes.detach().float().contiguous()
    index = torch.empty(len(points), dtype=torch.int32, device="cpu")
    result = library.hyper_winding_nearest(
        points.data_ptr(), len(points), nodes.data_ptr(), len(nodes), _threads(threads), index.data_ptr()
    )
    _check(result, "winding_nearest")
    return index


def _require() -> ctypes.CDLL:
    library = load()
    if library is None:
        raise KernelUnavailable(f"the compiled core is not available: {unavailable_reason()}")
    return library


def _stored(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if tensor.shape != shape:
        raise ShapeError(f"{name}: got shape {list(tensor.shape)}, wanted {list(shape)}")
    if tensor.dtype != dtype or not tensor.is_cpu:
        raise ConfigError(f"{name}: got {tensor.dtype} on {tensor.device}, wanted {dtype} on cpu")
    return tensor.contiguous()


def _activations(x: Tensor, plan: ShiftPlan) -> Tensor:
    if x.ndim != 2 or x.shape[1] != plan.in_features:
        raise ShapeError(f"x: got shape {list(x.shape)}, wanted [tokens, {plan.in_features}]")
    if x.dtype not in _DTYPES or not x.is_cpu:
        raise ConfigError(f"x: got {x.dtype} on {x.device}, wanted float32, bfloat16 or float16 on cpu")
    return x.contiguous()


def _panel_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"panels: got {dtype}, wanted float32 or bfloat16")
    return dtype


def _prepare_encode(tiles: Tensor, bits: int, survivor_bits: int) -> tuple[Tensor, Tensor]:
    _check_range("bits", bits, 1, 8)
    _check_range("survivor_bits", survivor_bits, 8, 16)
    if tiles.ndim != 2 or tiles.shape[1] != _TILE_WEIGHTS:
        raise ShapeError(f"tiles: got shape {list(tiles.shape)}, wanted [n, {_TILE_WEIGHTS}]")
    if tiles.device.type != "cpu":
        raise ConfigError(f"tiles: got a tensor on {tiles.device}, wanted cpu")
    tiles = tiles.detach().to(torch.float32).contiguous()
    return tiles, torch.empty(len(tiles), 8 * bits, dtype=torch.int32, device="cpu")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}: got {value}, wanted {low}..{high}")


def _check_multiplier(multiplier: int) -> None:
    if not 0 < multiplier < 1 << 32 or multiplier % 2 == 0:
        raise ConfigError(f"multiplier: got {multiplier}, wanted an odd number below 2^32")


def _threads(threads: int | None) -> int:
    if threads is None:
        return torch.get_num_threads()
    if threads < 1:
        raise ConfigError(f"threads: got {threads}, wanted 1 or more")
    return threads


def _check(result: int, function: str) -> None:
    if result == 0:
        return
    if result == _NON_FINITE:
        raise ConfigError(f"{function}: the input contains NaN or infinity; every value must be finite")
    if result == _MEMORY:
        raise MemoryError(f"{function}: the workspace could not be allocated")
    raise HyperError(f"{function}: the compiled core refused its arguments (code {result})")
