"""Which weights of a transformers model are compressed, decided from names and shapes alone."""

import functools

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from hf_hyper.config import HyperConfig
from hf_hyper.errors import ConfigError
from hf_hyper.nn.experts import ExpertBank, routers
from hf_hyper.nn.replace import original_weight, reshapable, weight_shape
from hf_hyper.pipeline.allocate import rates_between
from hf_hyper.plan import Plan, plan_shape

__all__ = ["plan_model"]

logger = logging.get_logger(__name__)

_LARGE = 0.02
"""Share of a model's weights in modules of one class from which it is said that they stay as they are."""


def plan_model(model: PreTrainedModel, config: HyperConfig, skipped: list[str]) -> dict[str, Plan | None]:
    """What becomes of every weight that can be stored; says which large ones stay as they are.

    Args:
        model: With plain banks of experts (`split_experts`); its weights are not read.
        config: What the user asked for.
        skipped: Names and patterns of modules that are left alone.

    Returns:
        Plans by module name, None for a weight too small to gain.

    Raises:
        ConfigError: Nothing is left to compress.
    """
    tied = {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}
    choices: dict[str, functools.partial[Plan | None]] = {}
    choosers = routers(model)
    for name, module in model.named_modules():
        shape = weight_shape(module)
        if shape is None or name in choosers or not _wanted(model, name, skipped):
            continue
        if isinstance(module, nn.Embedding) and not config.compress_embeddings:
            continue
        if name in tied:
            logger.warning(f"{name} stays as it is: its weight is tied to another module's.")
            continue
        bank = isinstance(module, ExpertBank)
        choices[name] = functools.partial(plan_shape, config, shape, reshapable(module), experts=bank)
    plans = {name: choose() for name, choose in choices.items()}
    kept = {name: plan.layout.num_weights for name, plan in plans.items() if plan is not None}
    for name, bits in rates_between(config, kept).items():
        plans[name] = choices[name](bits=bits)
    _say_what_stays(model, skipped)
    if all(plan is None for plan in plans.values()):
        raise ConfigError(
            f"no layer of {type(model).__name__} is left to compress: modules_to_not_convert excludes "
            f"{sorted(skipped)}, and layers too small to gain stay as they are; shorten that list or load the "
            "model without HyperConfig"
        )
    return plans


def _wanted(model: PreTrainedModel, name: str, skipped: list[str]) -> bool:
    """Whether `modules_to_not_convert` leaves a layer in; a bank of experts answers to its own name, that of its
    parameter and that of the module that holds it.
    """
    names = [name]
    if isinstance(model.get_submodule(name), ExpertBank):
        holder = name.rpartition(".")[0]
        names += [holder, f"{holder}.{original_weight(model, name)[1]}"]
    return all(should_convert_module(one, skipped) for one in names)


def _say_what_stays(model: PreTrainedModel, skipped: list[str]) -> None:
    """Warn of large weights in classes that cannot be compressed, such as experts fused in a way of their own."""
    total = sum(parameter.numel() for parameter in model.parameters())
    left: dict[str, int] = {}
    for name, module in model.named_modules():
        if weight_shape(module) is None and should_convert_module(name, skipped):
            own = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
            left[type(module).__name__] = left.get(type(module).__name__, 0) + own
    for kind, weights in left.items():
        if weights > _LARGE * total:
            logger.warning(f"{kind} stays as it is: {weights / total:.0%} of the weights are in a class of its own.")
