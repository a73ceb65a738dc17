"""Assertions and schemes shared by several test files."""

import torch
from torch import Tensor

from hf_hyper import hyperfunctions
from hf_hyper.hyperfunctions.winding import code_width
from hf_hyper.packing import unpack
from hf_hyper.scheme import TensorScheme

__all__ = ["assert_as_accurate_as", "decode_winding", "relative_error", "winding_codes", "winding_scheme"]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Euclidean norm of the difference over that of `wanted`, in float64."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-300))


def assert_as_accurate_as(exact: Tensor, same_dtype: Tensor, got: Tensor, *, atol: float = 1e-6) -> None:
    """A kernel may be at most twice as far from a float32 reference as plain arithmetic in its own dtype.

    Args:
        exact: Result computed in float32 or better.
        same_dtype: The same computed naively in the dtype of the kernel.
        got: The kernel's result.
        atol: Allowance on top, relative to the largest magnitude of `exact`.
    """
    assert got.dtype == same_dtype.dtype
    assert got.shape == exact.shape
    scale = float(exact.abs().max())
    error = float((got.double() - exact.double()).abs().max())
    allowed = 2 * float((same_dtype.double() - exact.double()).abs().max()) + atol * scale
    assert error <= allowed, f"largest error {error:.3g}, allowed {allowed:.3g} (values up to {scale:.3g})"
    assert torch.isfinite(got).all()


def winding_scheme(out_features: int = 16, in_features: int = 16, bits: float = 4, **options: object) -> TensorScheme:
    """`winding` without incoherence, with the options of `HyperConfig(winding=...)`."""
    rate, constants = hyperfunctions.get("winding").resolve(bits, options)
    return TensorScheme("winding", rate, out_features, in_features, incoherence=False, options=constants)


def decode_winding(tensors: dict[str, Tensor], scheme: TensorScheme) -> Tensor:
    """What stored tensors of `winding` stand for, before rotations are undone."""
    return hyperfunctions.get("winding").decode(tensors, scheme)


def winding_codes(tensors: dict[str, Tensor], scheme: TensorScheme) -> Tensor:
    """Codes of pairs, `[rows, ceil(in_features / 2)]`."""
    return unpack(tensors["codes"], code_width(scheme), -(-scheme.in_features // 2))
