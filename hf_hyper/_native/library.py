"""Finding the compiled core, choosing its instruction set and its threads, and turning its results into errors.

`HF_HYPER_ISA` chooses an instruction set (`avx512`, `avx2`, `neon`, `scalar`) or switches the core off (`off`).
"""

import contextlib
import ctypes
import functools
import os
import re
import sys
import warnings
from pathlib import Path

import torch

from hf_hyper.errors import ConfigError, HyperError, KernelUnavailable

_ABI_VERSION = 8
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

_POINTER, _INT, _INT64, _UINT32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32
_SIGNATURES = {
    "hyper_abi_version": (_INT, ()),
    "hyper_isa": (ctypes.c_char_p, ()),
    "hyper_matmul_isa": (ctypes.c_char_p, ()),
    "hyper_has_isa": (_INT, (ctypes.c_char_p,)),
    "hyper_set_isa": (_INT, (ctypes.c_char_p,)),
    "hyper_use_openmp": (None, (_POINTER,)),
    "hyper_shift_encode": (_INT, (_POINTER, _INT64, _INT, _INT, _UINT32, _INT, _POINTER)),
    "hyper_shift_encode_observable": (_INT, (_POINTER, _INT64, _INT, _INT, _POINTER, _INT, _POINTER)),
    "hyper_shift_decode": (_INT, (_POINTER, _INT64, _INT, _UINT32, _INT, _POINTER)),
    **dict.fromkeys(
        ("hyper_shift_matmul", "hyper_shift_matmul_dense"),
        (_INT, (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT64, _INT, _INT, _POINTER)),
    ),
    "hyper_dense_tokens": (_INT64, ()),
    "hyper_shift_rotate": (_INT, (_POINTER, _POINTER, _INT, _INT64, _INT, _POINTER, _INT, _POINTER)),
    "hyper_shift_decode_rows": (_INT, (_POINTER, _POINTER, _INT64, _INT64, _INT, _POINTER, _INT)),
    "hyper_shift_decode_weight": (_INT, (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _POINTER, _INT)),
    "hyper_shift_finish": (
        _INT,
        (_POINTER, _POINTER, _INT, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _INT64, _INT, _POINTER, _INT),
    ),
    **dict.fromkeys(
        ("hyper_winding_matmul", "hyper_winding_matmul_dense"),
        (_INT, (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT64, _INT, _POINTER)),
    ),
    "hyper_winding_decode": (
        _INT,
        (_POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT, _POINTER, _INT),
    ),
    "hyper_winding_nearest": (_INT, (_POINTER, _INT64, _POINTER, _INT64, _INT, _POINTER)),
}
_NON_FINITE, _MEMORY = -2, -3


@functools.cache
def find() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and the reason in one sentence."""
    isa = (os.environ.get("HF_HYPER_ISA") or "auto").lower()
    if isa == "off":
        return None, "HF_HYPER_ISA=off switches the compiled core off"
    path = Path(__file__).parent.with_name(f"hyper_core{_SUFFIX}")
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
    library.hyper_use_openmp(_openmp_of_torch())
    return library, None


def _openmp_of_torch() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch has loaded, or None where there is not exactly one.

    Torch's threads spin for milliseconds after their own work. Threads of ours would wait for the processor all that
    time, so jobs run on torch's instead. LLVM's and Intel's runtimes export the same entry on Linux.
    """
    with contextlib.suppress(OSError, AttributeError):
        maps = Path("/proc/self/maps").read_text(encoding="utf8", errors="replace")
        paths = set(re.findall(r"/.*/lib(?:gomp|omp|iomp5)\b[^/]*\.so[^/]*$", maps, re.MULTILINE))
        # In torch/lib or torch.libs.
        of_torch = {path for path in paths if path.startswith(str(Path(torch.__file__).parent))}
        paths = of_torch or paths
        if len(paths) == 1:
            entry = ctypes.CDLL(paths.pop()).GOMP_parallel
            return ctypes.cast(entry, ctypes.c_void_p).value
    return None


def load() -> ctypes.CDLL | None:
    """The compiled core, found once per process, or None where it is missing or switched off.

    Raises:
        ConfigError: `HF_HYPER_ISA` names an instruction set that this machine or this build lacks.
    """
    return find()[0]


def unavailable_reason() -> str | None:
    """Why `load` returns None, in one sentence; None when it does not."""
    return find()[1]


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


def matmul_isa() -> str | None:
    """Instruction set of products of activations; a lesser one where the machine has only part of `isa()`'s family."""
    library = load()
    return None if library is None else library.hyper_matmul_isa().decode()


def available_isas(library: ctypes.CDLL | None = None) -> list[str]:
    """Instruction sets this machine can run with this build, best first."""
    library = library or load()
    if library is None:
        return []
    return [name for name in ("avx512", "avx2", "neon", "scalar") if library.hyper_has_isa(name.encode())]


def set_isa(name: str) -> None:
    """Uses one instruction set for the rest of the process; no other call may be running.

    Args:
        name: One of `available_isas()`, or `auto` for the best.

    Raises:
        ConfigError: This machine or this build lacks it.
        KernelUnavailable: There is no compiled core.
    """
    if require().hyper_set_isa(name.encode()) != 0:
        raise ConfigError(f"set_isa: got {name!r}, wanted one of {', '.join(available_isas())} or auto")


def require() -> ctypes.CDLL:
    """The core, or KernelUnavailable."""
    library = load()
    if library is None:
        raise KernelUnavailable(f"the compiled core is not available: {unavailable_reason()}")
    return library


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raise ConfigError unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ConfigError(f"{name}: got {value}, wanted {low}..{high}")


def check_multiplier(multiplier: int) -> None:
    """Raise ConfigError unless `multiplier` can be the constant of an observable."""
    if not 0 < multiplier < 1 << 32 or multiplier % 2 == 0:
        raise ConfigError(f"multiplier: got {multiplier}, wanted an odd number below 2^32")


def thread_count(threads: int | None) -> int:
    """`threads`, or as many as torch uses where it is None."""
    if threads is None:
        return torch.get_num_threads()
    if threads < 1:
        raise ConfigError(f"threads: got {threads}, wanted 1 or more")
    return threads


def check(result: int, function: str) -> None:
    """Raise the error that a result of the core stands for, if any."""
    if result == 0:
        return
    if result == _NON_FINITE:
        raise ConfigError(f"{function}: the input contains NaN or infinity; every value must be finite")
    if result == _MEMORY:
        raise MemoryError(f"{function}: the workspace could not be allocated")
    raise HyperError(f"{function}: the compiled core refused its arguments (code {result})")
