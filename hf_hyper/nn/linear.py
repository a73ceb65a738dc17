"""`HyperLinear`: an `nn.Linear` whose weight is decoded from a hyperfunction.

It subclasses `nn.Linear`, so that adapters, hooks and name filters written for linear layers find it.
"""

import torch
from torch import Tensor, nn

from hf_hyper import codec
from hf_hyper.kernels import ops
from hf_hyper.layout import Layout
from hf_hyper.nn.stored import HyperLayer
from hf_hyper.scheme import TensorScheme

__all__ = ["HyperLinear"]


class HyperLinear(HyperLayer, nn.Linear):
    """Linear layer `y = x W^T + b` with `W` stored as in `scheme`.

    Args:
        scheme: How the weight is stored.
        bias: Whether the layer has a bias.
        dtype: Dtype of `bias`, and of `weight` when it is decoded.
        device: Device of the empty tensors, `meta` for a skeleton.
        plain: Class of the uncompressed layer: `nn.Linear`, or one built as `plain(out_features, in_features)` that
            holds its weight transposed (GPT-2's `Conv1D`).
        layout: How `W` becomes the stored matrix; the same unless given.

    Attributes:
        scheme: As given.
        compute_dtype: Dtype in which `weight` decodes; follows `.to(dtype)`, which leaves the stored tensors alone.
    """

    def __init__(
        self,
        scheme: TensorScheme,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        plain: type[nn.Module] = nn.Linear,
        layout: Layout | None = None,
    ) -> None:
        nn.Module.__init__(self)
        layout = layout or Layout((scheme.out_features, scheme.in_features))
        self.out_features, self.in_features = layout.shape
        self.compute_dtype, self.plain = dtype, plain
        self.describe(scheme, layout, device)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device))

    @classmethod
    def from_weight(
        cls, weight: Tensor, scheme: TensorScheme, bias: Tensor | None = None, *, effort: str = "balanced"
    ) -> "HyperLinear":
        """Layer that stores `weight`.

        Args:
            weight: `[out_features, in_features]` floating point.
            scheme: How to store it.
            bias: `[out_features]` or None; kept as it is.
            effort: Thoroughness of the search: `fast`, `balanced` or `best`.

        Example:
            >>> scheme = TensorScheme("shift", bits=4, out_features=32, in_features=64)
            >>> layer = HyperLinear.from_weight(torch.randn(32, 64), scheme)
            >>> layer(torch.randn(3, 64)).shape
            torch.Size([3, 32])
        """
        layer = cls(scheme, bias=bias is not None, dtype=weight.dtype, device="meta")
        layer.store(codec.quantize(weight, scheme, effort))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer

    @property
    def transposed_weight(self) -> bool:
        """Whether the uncompressed layer holds its weight as `[in_features, out_features]`."""
        return self.plain is not nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """`input` `[..., in_features]` to `[..., out_features]`, in the dtype of `input`."""
        if self.layout.plain:
            output = ops.matmul(input, self.stored(), self._key)
        else:
            output = nn.functional.linear(input, self.dequantize(input.dtype))
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def plain_layer(self, device: torch.device | str) -> nn.Module:
        """An `nn.Linear` or `Conv1D` of the same shape and mode, with new parameters."""
        with torch.device(device):
            if self.transposed_weight:
                plain = self.plain(self.out_features, self.in_features)
            else:
                plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        return plain.to(self.compute_dtype).train(self.training)

    def extra_repr(self) -> str:
        """Shape, hyperfunction, bits and stored bits per weight."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._storage_repr()}"
        )
