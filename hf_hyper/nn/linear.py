"""`HyperLinear`: an `nn.Linear` whose weight is decoded from a hyperfunction.

It subclasses `nn.Linear`, so that adapters, hooks and name filters written for linear layers find it. Instead of
`weight` it holds the stored tensors under their own names (`codes`, `scale`, ...); reading `weight` decodes it. While a
model is compressed during loading, a placeholder parameter `weight` on the meta device stands where the loader
expects one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_hyper import codec
from hf_hyper.errors import ConfigError
from hf_hyper.kernels import ops
from hf_hyper.scheme import TensorScheme

__all__ = ["HyperLinear"]


class HyperLinear(nn.Linear):
    """Linear layer `y = x W^T + b` with `W` stored as in `scheme`.

    Args:
        scheme: How the weight is stored.
        bias: Whether the layer has a bias.
        dtype: Dtype of `bias`, and of `weight` when it is decoded.
        device: Device of the empty tensors, `meta` for a skeleton.
        plain: Class of the uncompressed layer: `nn.Linear`, or one built as `plain(out_features, in_features)` that
            holds its weight transposed (GPT-2's `Conv1D`).

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
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = scheme.in_features, scheme.out_features
        self.scheme, self.compute_dtype, self.plain = scheme, dtype, plain
        specs = codec.tensor_specs(scheme)
        self._key = scheme.key
        self._dtypes = {name: spec.dtype for name, spec in specs.items()}
        for name, spec in specs.items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
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

    def store(self, tensors: dict[str, Tensor]) -> None:
        """Replace the stored tensors by `tensors`, named as in `codec.tensor_specs`."""
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    @property
    def transposed(self) -> bool:
        """Whether the uncompressed layer holds its weight as `[in_features, out_features]`."""
        return self.plain is not nn.Linear

    def stored(self) -> list[Tensor]:
        """Stored tensors in the order and the dtypes of `codec.tensor_specs`.

        Tools that upcast every parameter in place find them changed; going back to the stored dtype loses nothing.
        """
        parameters = self._parameters
        return [  # a call of `to` takes longer than the comparison, and models make hundreds a token
            tensor if (tensor := parameters[name]).dtype == dtype else tensor.to(dtype)  # pyright: ignore
            for name, dtype in self._dtypes.items()
        ]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, `[out_features, in_features]` in `dtype` (default `compute_dtype`)."""
        return ops.decode(self.stored(), self._key, dtype or self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """`input` `[..., in_features]` to `[..., out_features]`, in the dtype of `input`."""
        output = ops.matmul(input, self.stored(), self._key)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        """Shape, hyperfunction, bits and stored bits per weight."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"hyperfunction={self.scheme.hyperfunction}, bits={self.scheme.bits:g}, "
            f"bits_per_weight={codec.bits_per_weight(self.scheme):.3f}"
        )

    def reset_parameters(self) -> None:
        """Stored tensors are not initialised at random: nothing to do."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "weight" not in self._parameters:
            raise ConfigError(
                "weight of a HyperLinear cannot be assigned: it is decoded from stored tensors; build a new layer with "
                "HyperLinear.from_weight, or call model.dequantize() first"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "weight" not in self.__dict__.get("_parameters", {}):
            return self.dequantize()
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HyperLinear":
        """Move the stored tensors with the module but keep their dtypes, which the format fixes."""
        names = list(self._dtypes)
        kept = {name: self._parameters.pop(name) for name in names}
        try:
            super()._apply(fn, recurse)
            for name in names:
                data = self._keep_dtype(fn, kept[name])
                kept[name] = nn.Parameter(data, requires_grad=False)
        finally:
            self._parameters.update(kept)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.stored()[0].device)).dtype
        return self

    @staticmethod
    def _keep_dtype(fn: Callable[[Tensor], Tensor], parameter: nn.Parameter | None) -> Tensor:
        assert parameter is not None
        moved = fn(parameter.data)
        return moved if moved.dtype == parameter.dtype else parameter.data.to(moved.device)
