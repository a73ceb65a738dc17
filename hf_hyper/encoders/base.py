"""The table from hyperfunction to encoder."""

from collections.abc import Callable

from torch import Tensor

from hf_hyper.encoders import nearest, shift
from hf_hyper.errors import ConfigError
from hf_hyper.scheme import TensorScheme

__all__ = ["EFFORTS", "encode"]

EFFORTS = ("fast", "balanced", "best")

_ENCODERS: dict[str, Callable[[Tensor, TensorScheme, str], dict[str, Tensor]]] = {
    "shift": shift.encode_shift,
    "winding": nearest.encode_winding,
}


def encode(weight: Tensor, scheme: TensorScheme, effort: str = "balanced") -> dict[str, Tensor]:
    """Tensors of the orbit that passes closest to `weight`.

    Args:
        weight: Finite float32 in the basis of the scheme: `[padded_out, padded_in]` with incoherence, else
            `[out_features, in_features]`.
        scheme: How it will be stored.
        effort: Thoroughness of the search, one of `EFFORTS`; never changes the format.

    Returns:
        Tensors as the hyperfunction's `tensors(scheme)` describes them, on the weight's device.

    Raises:
        ConfigError: Unknown effort or hyperfunction.
    """
    if effort not in EFFORTS:
        raise ConfigError(f"effort {effort!r} does not exist; choose one of {', '.join(map(repr, EFFORTS))}")
    if scheme.hyperfunction not in _ENCODERS:
        raise ConfigError(f"hyperfunction {scheme.hyperfunction!r} has no encoder; choose one of {sorted(_ENCODERS)}")
    return _ENCODERS[scheme.hyperfunction](weight, scheme, effort)
