"""Convolutions whose weights are decoded from a hyperfunction.

A weight `[out, in / groups, k, ...]` is stored as a matrix with one row an output channel, or with other rows where
these are short or few (see `layout.py`). Every forward pass decodes it and runs torch's convolution.
"""

import torch
from torch import nn

from hf_hyper.layout import Layout
from hf_hyper.nn.stored import HyperLayer
from hf_hyper.scheme import TensorScheme

__all__ = [
    "HyperConv1d",
    "HyperConv2d",
    "HyperConv3d",
    "HyperConvTranspose1d",
    "HyperConvTranspose2d",
    "HyperConvTranspose3d",
]

_SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class _HyperConv(HyperLayer):
    """Convolution like `plain`, with empty stored tensors on the meta device.

    Args:
        plain: The layer to replace, of exactly the class that this one subclasses; its parameters are not read.
        scheme: How the matrix is stored.
        layout: How the weight becomes that matrix.
        dtype: Dtype of `bias`, and of `weight` when it is decoded.
    """

    plain: type[nn.Module]

    def __init__(self, plain: nn.Module, scheme: TensorScheme, layout: Layout, dtype: torch.dtype) -> None:
        settings = _settings(plain, plain.bias is not None)
        self.plain.__init__(self, **settings, dtype=dtype, device="meta")  # pyright: ignore[reportCallIssue]
        del self._parameters["weight"]
        self.compute_dtype = dtype
        self.describe(scheme, layout, "meta")

    def plain_layer(self, device: torch.device | str) -> nn.Module:
        """A convolution of the same settings and mode, with new parameters."""
        settings = _settings(self, self.bias is not None)
        return self.plain(**settings, dtype=self.compute_dtype, device=device).train(self.training)

    def extra_repr(self) -> str:
        """Settings of the convolution, hyperfunction, bits and stored bits per weight."""
        return f"{super().extra_repr()}, {self._storage_repr()}"


def _settings(layer: nn.Module, bias: bool) -> dict[str, object]:
    names = (*_SETTINGS, "output_padding") if getattr(layer, "transposed", False) else _SETTINGS
    return {**{name: getattr(layer, name) for name in names}, "bias": bias}


class HyperConv1d(_HyperConv, nn.Conv1d):
    """`nn.Conv1d` with a stored weight `[out, in / groups, k]`."""

    plain = nn.Conv1d


class HyperConv2d(_HyperConv, nn.Conv2d):
    """`nn.Conv2d` with a stored weight `[out, in / groups, k, k]`."""

    plain = nn.Conv2d


class HyperConv3d(_HyperConv, nn.Conv3d):
    """`nn.Conv3d` with a stored weight `[out, in / groups, k, k, k]`."""

    plain = nn.Conv3d


class HyperConvTranspose1d(_HyperConv, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a stored weight `[in, out / groups, k]`."""

    plain = nn.ConvTranspose1d


class HyperConvTranspose2d(_HyperConv, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a stored weight `[in, out / groups, k, k]`."""

    plain = nn.ConvTranspose2d


class HyperConvTranspose3d(_HyperConv, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with a stored weight `[in, out / groups, k, k, k]`."""

    plain = nn.ConvTranspose3d
