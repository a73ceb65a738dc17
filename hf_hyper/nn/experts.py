"""Mixtures of experts whose fused weights are decoded from a hyperfunction.

transformers keeps the weights of all experts of a layer in two parameters, `gate_up_proj` (or `up_proj`) and
`down_proj`, of shape `[experts, out, in]` or, in some models, transposed. Each becomes a *bank*: a module of its own
that multiplies rows of activations with the weights of the experts they are sent to. Every expert is stored by itself
with the scheme of the bank, so that only experts with rows are decoded.

The module that holds the banks keeps its settings, biases and gate: its class changes to a subclass of its own, whose
`gate_up_proj` and `down_proj` decode on access and whose forward pass goes through the banks. Banks are named
`hyper_gate_up` and `hyper_down`, names that transformers passes through unchanged where it splits and renames
fused weights on saving and loading.

    split_experts(model)    all fused weights become plain banks; parameters are moved, not copied
    ...                     some banks are swapped for compressed ones
    join_experts(model)     plain banks become parameters again
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_hyper.errors import ConfigError, FormatError
from hf_hyper.kernels import ops
from hf_hyper.layout import Layout
from hf_hyper.nn.stored import HyperLayer
from hf_hyper.routing import rows_by_expert
from hf_hyper.scheme import TensorScheme

__all__ = [
    "BANKS",
    "FUSED",
    "ExpertBank",
    "HyperExpertBank",
    "HyperExperts",
    "join_experts",
    "routers",
    "split_experts",
]

BANKS = {"gate_up_proj": "hyper_gate_up", "up_proj": "hyper_up", "down_proj": "hyper_down"}
"""Name of the bank that takes the place of a parameter."""

FUSED = {bank: parameter for parameter, bank in BANKS.items()}
"""The reverse."""

_FIRST = ("gate_up_proj", "up_proj")
_LAST = "down_proj"


class ExpertBank(nn.Module):
    """One linear map for every expert, uncompressed.

    Args:
        weight: `[experts, out_features, in_features]`.
        transposed: Whether the model keeps it as `[experts, in_features, out_features]`.
    """

    weight: Tensor

    def __init__(self, weight: nn.Parameter, transposed: bool) -> None:
        super().__init__()
        self.weight, self.transposed = weight, transposed

    def forward(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Every row `[n, in_features]` times the weight of its expert `[n]`; zeros where that is no expert's number."""
        return _product(rows, ids, self.weight)


class HyperExpertBank(HyperLayer, ExpertBank):
    """A bank like `plain`, with empty stored tensors on the meta device.

    Args:
        plain: The bank to replace; its weight is not read.
        scheme: How the matrix of every expert is stored.
        layout: How the bank becomes these matrices.
        dtype: Dtype of `weight` when it is decoded.
    """

    def __init__(self, plain: ExpertBank, scheme: TensorScheme, layout: Layout, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        if layout.experts is None:
            raise FormatError(f"scheme of {len(plain.weight)} experts has no field 'experts'; config.json is damaged")
        self.compute_dtype, self.transposed = dtype, plain.transposed
        self.describe(scheme, layout, "meta")

    @property
    def transposed_weight(self) -> bool:
        """Whether the model keeps the weight as `[experts, in_features, out_features]`."""
        return self.transposed

    def forward(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Every row `[n, in_features]` times the weight of its expert `[n]`; zeros where that is no expert's number."""
        return ops.matmul_experts(rows, ids, self.stored(), self._key)

    def plain_layer(self, device: torch.device | str) -> nn.Module:
        """A plain bank of the same shape, its weight not initialised."""
        weight = torch.empty(self.layout.shape, dtype=self.compute_dtype, device=device)
        return ExpertBank(nn.Parameter(weight), self.transposed).train(self.training)

    def restored(self, dtype: torch.dtype) -> nn.Module:
        """The plain bank with the decoded weight in `dtype`."""
        return ExpertBank(nn.Parameter(self.dequantize(dtype)), self.transposed).train(self.training)

    def extra_repr(self) -> str:
        """Shape, hyperfunction, bits and stored bits per weight."""
        experts, out_features, in_features = self.layout.shape
        return f"{experts} x [{out_features}, {in_features}], {self._storage_repr()}"


class HyperExperts(nn.Module):
    """Mixin in front of the class of a module that holds the fused weights of experts."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward pass of the class that this one subclasses.

        Classes that transformers' kernels of experts can run all do the same, and so does this: `hidden_states`
        `[tokens, hidden]`, the experts `[tokens, k]` of every token, and how much each counts, `[tokens, k]`. Classes
        with another forward pass run it on decoded weights.
        """
        if not hasattr(self, "_apply_gate"):
            with self._decoded():
                return super().forward(hidden_states, *args, **kwargs)
        return self._route(hidden_states, *args, **kwargs)

    def _route(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = top_k_index.shape[1]
        ids = top_k_index.reshape(-1)
        rows = self._multiply(self._first(), hidden_states.repeat_interleave(chosen, 0), ids)
        rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
        rows = self._multiply(_LAST, rows, ids)
        if getattr(self, "has_post_expert_norm", False):
            rows = self.post_expert_norm(rows)
        rows = rows * top_k_weights.reshape(-1, 1)
        return rows.unflatten(0, (-1, chosen)).sum(1).to(hidden_states.dtype)

    def _multiply(self, name: str, rows: Tensor, ids: Tensor) -> Tensor:
        bank = self._modules.get(BANKS[name])
        if bank is None:
            weight = self.get_parameter(name)
            product = _product(rows, ids, weight.mT if self.is_transposed else weight)
        else:
            product = bank(rows, ids)
        if not self.has_bias:
            return product
        bias = self.get_parameter(f"{name}_bias")
        return product + bias[ids.clamp(0, len(bias) - 1)].to(product.dtype)

    def _first(self) -> str:
        held = self._modules.keys() | self._parameters.keys()
        return next(name for name in _FIRST if name in held or BANKS[name] in held)

    @contextlib.contextmanager
    def _decoded(self) -> Iterator[None]:
        """Decoded once, however often the weights are read meanwhile."""
        names = [FUSED[name] for name in self._modules if name in FUSED]
        self.__dict__.update({name: getattr(self, name) for name in names})
        try:
            yield
        finally:
            for name in names:
                self.__dict__.pop(name, None)  # another thread may have been here

    def __getattr__(self, name: str) -> Any:
        bank = self.__dict__.get("_modules", {}).get(BANKS.get(name, ""))
        if bank is None or name in self._parameters:
            return super().__getattr__(name)
        return bank.weight.mT if bank.transposed else bank.weight

    def __setattr__(self, name: str, value: Any) -> None:
        if BANKS.get(name) in self.__dict__.get("_modules", {}) and name not in self._parameters:
            raise ConfigError(
                f"{name} of {type(self).__name__} cannot be assigned: it is decoded from stored tensors; call "
                "model.dequantize() first"
            )
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """The class is made at run time, so copies and pickles go through that of the plain module."""
        return _empty, (type(self).__mro__[2],), self.__dict__


def split_experts(model: nn.Module) -> None:
    """Turn all fused weights of experts in a model into plain banks, in place; parameters are moved, not copied."""
    for module in list(model.modules()):
        found = _fused(module)
        if not found:
            continue
        module.__class__ = _hyper_class(type(module))
        for name, transposed in found.items():
            weight = module._parameters.pop(name)
            assert isinstance(weight, nn.Parameter)
            if transposed:
                weight = nn.Parameter(weight.data.mT, requires_grad=weight.requires_grad)
            module.add_module(BANKS[name], ExpertBank(weight, transposed).train(module.training))


def join_experts(model: nn.Module) -> None:
    """Turn plain banks into parameters again; modules without compressed banks get back the class they had."""
    for module in list(model.modules()):
        if not isinstance(module, HyperExperts):
            continue
        banks = {name: bank for name, bank in module._modules.items() if isinstance(bank, ExpertBank)}
        for name, bank in banks.items():
            if isinstance(bank, HyperExpertBank):
                continue
            del module._modules[name]
            weight = bank.get_parameter("weight")
            if bank.transposed:
                weight = nn.Parameter(weight.data.mT.contiguous(), requires_grad=weight.requires_grad)
            module._parameters[FUSED[name]] = weight
        if not any(isinstance(bank, HyperExpertBank) for bank in banks.values()):
            module.__class__ = type(module).__mro__[2]


def routers(model: nn.Module) -> set[str]:
    """Names of linear layers that choose among experts: beside them, one output for each.

    They are small, and an error in one sends tokens elsewhere.
    """
    found = set()
    for name, module in model.named_modules():
        if not isinstance(module, HyperExperts):
            continue
        beside = name.rpartition(".")[0]
        banks = [bank for bank in module._modules.values() if isinstance(bank, ExpertBank)]
        for inner, layer in model.get_submodule(beside).named_modules(prefix=beside):
            if isinstance(layer, nn.Linear) and layer.out_features in {_experts(bank) for bank in banks}:
                found.add(inner)
    return found


def _experts(bank: ExpertBank) -> int:
    return bank.layout.shape[0] if isinstance(bank, HyperExpertBank) else len(bank.weight)


def _fused(module: nn.Module) -> dict[str, bool]:
    """Parameters of a module that are fused weights of experts, and whether they are transposed."""
    first = next((name for name in _FIRST if name in module._parameters), None)
    last = module._parameters.get(_LAST)
    if first is None or last is None or isinstance(module, HyperExperts):
        return {}
    one = module.get_parameter(first)
    if one.ndim != 3 or last.ndim != 3 or len(one) != len(last):
        return {}
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:  # a class with a forward pass of its own: its shapes tell, if there is a gate
        if tuple(one.shape[1:]) == (last.shape[2], 2 * last.shape[1]):
            transposed = True
        elif tuple(one.shape[1:]) == (2 * last.shape[2], last.shape[1]):
            transposed = False
        else:
            return {}
    return {first: bool(transposed), _LAST: bool(transposed)}


def _product(rows: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    if torch.is_autocast_enabled(rows.device.type):  # what `linear` returns there
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    product = rows.new_zeros(len(rows), weight.shape[1])
    for expert, own in rows_by_expert(ids, len(weight)):
        product[own] = linear(rows[own], weight[expert].to(rows.dtype))
    return product


@functools.cache
def _hyper_class(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Hyper{plain.__name__}", (HyperExperts, plain), {"__module__": plain.__module__})


def _empty(plain: type[nn.Module]) -> nn.Module:
    """A module of the subclass of `plain` without any state."""
    made = _hyper_class(plain)
    return made.__new__(made)
