"""The compiled core: its loader and typed wrappers over its C interface (`csrc/hyper.h`).

The core is one shared library in the package, opened with ctypes: no Python headers, so one wheel serves every Python,
and the interpreter lock is released during every call. It is optional. `load` returns None where it is missing or
switched off, `unavailable_reason` says why, and callers fall back to the torch reference.
"""

from hf_hyper._native.library import (
    available_isas,
    find,
    isa,
    load,
    matmul_isa,
    say_if_absent,
    set_isa,
    unavailable_reason,
)
from hf_hyper._native.shift import shift_decode, shift_encode, shift_encode_observable
from hf_hyper._native.shift_matmul import (
    ShiftPlan,
    dense_tokens,
    shift_decode_rows,
    shift_decode_weight,
    shift_finish,
    shift_matmul,
    shift_matmul_dense,
    shift_rotate,
)
from hf_hyper._native.winding import winding_nearest
from hf_hyper._native.winding_matmul import MAX_WIDTH as WINDING_MAX_WIDTH
from hf_hyper._native.winding_matmul import WindingPlan, winding_decode, winding_matmul, winding_matmul_dense

__all__ = [
    "WINDING_MAX_WIDTH",
    "ShiftPlan",
    "WindingPlan",
    "available_isas",
    "dense_tokens",
    "find",
    "isa",
    "load",
    "matmul_isa",
    "say_if_absent",
    "set_isa",
    "shift_decode",
    "shift_decode_rows",
    "shift_decode_weight",
    "shift_encode",
    "shift_encode_observable",
    "shift_finish",
    "shift_matmul",
    "shift_matmul_dense",
    "shift_rotate",
    "unavailable_reason",
    "winding_decode",
    "winding_matmul",
    "winding_matmul_dense",
    "winding_nearest",
]
