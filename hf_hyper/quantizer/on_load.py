"""Compression while a model loads: the loader hands over every weight, and puts the stored tensors in its place."""
# transformers annotates what plugins override with the types of its own stubs.
# pyright: reportIncompatibleMethodOverride=false

import functools
import time
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.utils import logging

from hf_hyper.config import FORMAT_VERSION, HyperConfig
from hf_hyper.errors import HyperError
from hf_hyper.nn.experts import join_experts
from hf_hyper.nn.replace import layer_of, original_weight
from hf_hyper.nn.stored import HyperLayer, layer_specs, relative_error
from hf_hyper.plan import Plan, plan_weight
from hf_hyper.storage.resume import TensorStore

__all__ = ["HyperQuantize", "leave_out"]


class HyperQuantize(ConversionOps):
    """Loader operation: one full weight in, the tensors of its scheme out. One serves all weights of a model.

    Args:
        config: How to compress; schemes of weights that turn out otherwise than planned are recorded in it.
        plans: What becomes of every weight.

    Attributes:
        measured: `relative_error` and `seconds` of every module that was compressed.
        failure: First error. The loader would collect it in a report and go on; it is raised by `finish` instead, and
            nothing is compressed in between.
    """

    def __init__(self, config: HyperConfig, plans: dict[str, Plan]) -> None:
        self.config, self.plans = config, plans
        self.measured: dict[str, dict[str, float]] = {}
        self.failure: HyperError | None = None
        self.progress = logging.tqdm(total=len(plans), desc=f"Compressing to {config.bits:g} bits", unit="tensor")

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Compress `{name: tensor}`; tensors of other modules, which a split may bring along, pass unchanged.

        Args:
            input_dict: Tensors by target name; a single one may stand under its pattern, a list holds one tensor.
            model: The skeleton that is being filled.
            full_layer_name: Full target name, the first one where there are several.
            missing_keys: Names the loader has not met yet, changed in place.

        Returns:
            Tensors by full name.
        """
        results: dict[str, Tensor] = {}
        for key, value in input_dict.items():
            target = full_layer_name if len(input_dict) == 1 else key
            tensor: Tensor = value[0] if isinstance(value, list) else value
            found = layer_of(model, target)
            if found is None:
                results[target] = tensor
                continue
            name, layer = found
            stored = self._store(name, layer, tensor.mT if layer.transposed_weight else tensor)
            if stored is None:
                results[target] = tensor
                _keep_plain(model, name, layer, missing_keys)
                continue
            results.update({f"{name}.{key}": tensor for key, tensor in stored.items()})
            owner, key = original_weight(model, name)
            owner._parameters.pop(key, None)
            if missing_keys is not None:
                missing_keys.discard(target)
        return results

    def finish(self) -> None:
        """Close the progress bar, and raise the first error if there was one."""
        self.progress.close()
        if self.failure is not None:
            raise self.failure

    def _store(self, name: str, layer: HyperLayer, weight: Tensor) -> dict[str, Tensor] | None:
        """Stored tensors, or None for a weight that is to stay as it is."""
        config, started = self.config, time.perf_counter()
        try:
            if self.failure is not None:
                return _unfilled(layer)
            plan = plan_weight(config, weight, self.plans[name])
            if plan is None:
                del config.tensor_schemes[name]
                self.progress.update()
                return None
            question = (
                f"{plan.scheme.key},effort={config.effort},format={FORMAT_VERSION},hf-hyper={version('hf-hyper')}"
            )
            make = functools.partial(plan.quantize, weight, config.effort, name)
            tensors = TensorStore.current().get_or_make(weight, question, make)
        except HyperError as error:
            self.failure = error
            return _unfilled(layer)
        if plan.layout != layer.layout or plan.scheme != layer.scheme:
            layer.describe(plan.scheme, plan.layout, "meta")
            config.record(name, plan.scheme, plan.layout)
        self.measured[name] = {
            "relative_error": relative_error(
                weight,
                [tensors[key] for key in layer_specs(plan.scheme, plan.layout)],
                plan.scheme.key,
                plan.layout,
            ),
            "seconds": time.perf_counter() - started,
        }
        self.progress.update()
        return tensors


def leave_out(model: Any, name: str, layer: HyperLayer) -> None:
    """Undo the swap of a layer for which the checkpoint has no weight: it is initialised like any other."""
    owner, key = original_weight(model, name)
    owner._parameters.pop(key)
    plain = layer.plain_layer(layer.stored()[0].device)
    model.set_submodule(name, plain)
    join_experts(model)
    model._init_weights(plain if owner is layer else owner)


def _keep_plain(model: nn.Module, name: str, layer: HyperLayer, missing_keys: set[str] | None) -> None:
    """Undo the swap of a layer whose weight is to stay as it is; the loader fills in the weight, and the bias unless
    it has been there already.
    """
    owner, key = original_weight(model, name)
    owner._parameters.pop(key, None)
    plain = layer.plain_layer("meta")
    bias = getattr(layer, "bias", None)
    if bias is not None and not bias.is_meta:
        plain.bias = bias
    model.set_submodule(name, plain)
    join_experts(model)
    for key in layer_specs(layer.scheme, layer.layout):
        (missing_keys or set()).discard(f"{name}.{key}")


def _unfilled(layer: HyperLayer) -> dict[str, Tensor]:
    """Something for the loader to place until the failure is raised."""
    specs = layer_specs(layer.scheme, layer.layout)
    return {key: torch.zeros(spec.shape, dtype=spec.dtype) for key, spec in specs.items()}
