"""`HyperLayer`: what all layers with a stored weight have in common.

Instead of `weight` they hold the stored tensors under their own names (`codes`, `scale`, ...); reading `weight` decodes
it. That is all most layers need: the forward pass of `torch.nn`'s convolutions reads `weight` and works unchanged.
While a model is compressed during loading, a placeholder parameter `weight` on the meta device stands where the loader
expects one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_hyper import codec
from hf_hyper.errors import ConfigError
from hf_hyper.hyperfunctions import TensorSpec
from hf_hyper.kernels import ops
from hf_hyper.layout import MASK, Layout
from hf_hyper.scheme import TensorScheme

__all__ = ["HyperLayer", "decode", "decode_experts", "layer_specs", "relative_error"]


def layer_specs(scheme: TensorScheme, layout: Layout) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of the tensors that a layer holds for its weight."""
    specs = dict(codec.tensor_specs(scheme))
    if layout.experts is not None:
        return {name: TensorSpec((layout.experts, *spec.shape), spec.dtype) for name, spec in specs.items()}
    if layout.pruned is not None:
        specs[MASK] = TensorSpec((layout.mask_words,), torch.int32)
    return specs


def decode(tensors: list[Tensor], key: str, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The weight of a layer.

    Args:
        tensors: In the order of `layer_specs`.
        key: Of the scheme.
        layout: Between matrix and weight.
        dtype: Floating-point dtype of the result.

    Returns:
        `layout.shape` in `dtype`.
    """
    if layout.experts is None:
        mask = tensors[-1] if layout.pruned is not None else None
        return layout.from_matrix(ops.decode(tensors[: None if mask is None else -1], key, dtype), mask)
    weight = torch.empty(layout.shape, dtype=dtype, device=tensors[0].device)
    for expert, own in enumerate(decode_experts(tensors, key, dtype)):
        weight[expert] = own
    return weight


def decode_experts(tensors: list[Tensor], key: str, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """The matrix `[out, in]` of one expert after the other; arguments as for `decode`."""
    for expert in range(len(tensors[0])):
        yield ops.decode([tensor[expert] for tensor in tensors], key, dtype)


def relative_error(weight: Tensor, tensors: list[Tensor], key: str, layout: Layout) -> float:
    """`||W - W'||² / ||W||²` of a weight `layout.shape` and its stored tensors; experts are decoded one by one."""
    if layout.experts is None:
        return codec.relative_error(weight, decode(tensors, key, layout, torch.float32))
    total, energies = 0.0, 0.0
    for own, decoded in zip(weight, decode_experts(tensors, key), strict=True):
        energy = float(own.double().square().sum())
        total, energies = total + energy * codec.relative_error(own, decoded), energies + energy
    return total / energies if energies > 0 else 0.0


class StoredParameter(nn.Parameter):
    """A stored tensor, which never counts as floating point.

    transformers takes the dtype of a model from its first parameter that does, and a scale is no measure of it.
    """

    def is_floating_point(self) -> bool:
        """False, whatever the dtype."""
        return False


class HyperLayer(nn.Module):
    """Mixin in front of a class of `torch.nn` that has a `weight`.

    Attributes:
        scheme: How the matrix is stored.
        layout: How the weight becomes that matrix.
        compute_dtype: Dtype in which `weight` decodes; follows `.to(dtype)`, which leaves the stored tensors alone.
        bias: As in the plain layer, if it has one.
    """

    scheme: TensorScheme
    layout: Layout
    compute_dtype: torch.dtype
    bias: Any

    def describe(self, scheme: TensorScheme, layout: Layout, device: torch.device | str | None = None) -> None:
        """Take on a scheme and a layout: empty stored tensors in the place of earlier ones.

        Args:
            scheme: How the matrix is stored.
            layout: How the weight becomes that matrix.
            device: Device of the empty tensors, `meta` for a skeleton.
        """
        for name in self.__dict__.get("_dtypes", ()):
            del self._parameters[name]
        specs = layer_specs(scheme, layout)
        self.scheme, self.layout, self._key = scheme, layout, scheme.key
        self._dtypes = {name: spec.dtype for name, spec in specs.items()}
        for name, spec in specs.items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, StoredParameter(empty, requires_grad=False))

    def store(self, tensors: dict[str, Tensor]) -> None:
        """Replace the stored tensors by `tensors`, named as in `layer_specs`."""
        for name, tensor in tensors.items():
            setattr(self, name, StoredParameter(tensor, requires_grad=False))

    @property
    def transposed_weight(self) -> bool:
        """Whether the uncompressed layer holds its weight transposed."""
        return False

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight with every overhead."""
        specs = layer_specs(self.scheme, self.layout)
        return 8 * sum(spec.num_bytes for spec in specs.values()) / self.layout.num_weights

    def stored(self) -> list[Tensor]:
        """Stored tensors in the order and the dtypes of `layer_specs`.

        Tools that upcast every parameter in place find them changed; going back to the stored dtype loses nothing.
        """
        parameters = self._parameters
        return [  # a call of `to` takes longer than the comparison, and models make hundreds a token
            tensor if (tensor := parameters[name]).dtype == dtype else tensor.to(dtype)  # pyright: ignore
            for name, dtype in self._dtypes.items()
        ]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, `layout.shape` in `dtype` (default `compute_dtype`)."""
        return decode(self.stored(), self._key, self.layout, dtype or self.compute_dtype)

    def plain_layer(self, device: torch.device | str) -> nn.Module:
        """An uncompressed layer of the class, shape and mode of the one this replaced, with new parameters."""
        raise NotImplementedError

    def restored(self, dtype: torch.dtype) -> nn.Module:
        """The uncompressed layer with the decoded weight in `dtype`."""
        weight = self.dequantize(dtype)
        plain = self.plain_layer("meta")
        plain.weight = nn.Parameter(weight.T.contiguous() if self.transposed_weight else weight)
        if getattr(self, "bias", None) is not None:
            plain.bias = nn.Parameter(self.bias.detach().to(dtype))
        return plain

    def reset_parameters(self) -> None:
        """Stored tensors are not initialised at random: nothing to do."""

    def _storage_repr(self) -> str:
        return (
            f"hyperfunction={self.scheme.hyperfunction}, bits={self.scheme.bits:g}, "
            f"bits_per_weight={self.bits_per_weight:.3f}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "weight" not in self._parameters and "_dtypes" in self.__dict__:
            raise ConfigError(
                f"weight of a {type(self).__name__} cannot be assigned: it is decoded from stored tensors; build a "
                "new layer from the weight, or call model.dequantize() first"
            )
        if isinstance(value, nn.Parameter) and name in self.__dict__.get("_dtypes", ()):
            initialized = getattr(value, "_is_hf_initialized", False)  # the loader's note
            value = StoredParameter(value.data, requires_grad=False)
            value.__dict__["_is_hf_initialized"] = initialized
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "weight" not in self.__dict__.get("_parameters", {}) and "_dtypes" in self.__dict__:
            return self.dequantize()
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HyperLayer":
        """Move the stored tensors with the module but keep their dtypes, which the format fixes."""
        names = list(self._dtypes)
        kept = {name: self._parameters.pop(name) for name in names}
        try:
            super()._apply(fn, recurse)
            for name in names:
                data = self._keep_dtype(fn, kept[name])
                kept[name] = StoredParameter(data, requires_grad=False)
        finally:
            self._parameters.update(kept)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.stored()[0].device)).dtype
        return self

    @staticmethod
    def _keep_dtype(fn: Callable[[Tensor], Tensor], parameter: nn.Parameter | None) -> Tensor:
        assert parameter is not None
        moved = fn(parameter.data)
        return moved if moved.dtype == parameter.dtype else parameter.data.to(moved.device)
