"""One extra tensor in a saved folder, under the original name of a compressed weight, with a shape that does not fit.

transformers without this package skips unknown quantizers with a warning and would go on with random weights; the
sentinel turns that into an error.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_hyper.nn.experts import HyperExpertBank
from hf_hyper.nn.replace import hyper_modules, original_weight
from hf_hyper.nn.stored import HyperLayer

__all__ = ["original_name", "sentinel", "sentinel_name"]

_TEXT = b"Compressed with hf-hyper. To load: pip install hf-hyper, then import hf_hyper first."


def sentinel() -> Tensor:
    """What a person reads who opens the file: uint8, one dimension, ASCII."""
    return torch.tensor(list(_TEXT), dtype=torch.uint8)


def sentinel_name(model: PreTrainedModel) -> str:
    """Name of a tensor that the uncompressed model has in its files and a compressed one has not.

    Experts are fused while they load, and a fused weight has other names in files.
    """
    name, layer = _first_layer(model)
    original = original_name(model)
    if not isinstance(layer, HyperExpertBank):
        return original
    owner, key = original_weight(model, name)
    fused = torch.empty(getattr(owner, key).shape, device="meta")
    return next(iter(revert_weight_conversion(model, {original: fused})))


def original_name(model: PreTrainedModel) -> str:
    """Name that the weight of this layer has in an uncompressed model."""
    name, layer = _first_layer(model)
    key = original_weight(model, name)[1]
    return f"{name.rpartition('.')[0] if isinstance(layer, HyperExpertBank) else name}.{key}"


def _first_layer(model: PreTrainedModel) -> tuple[str, HyperLayer]:
    """The first compressed layer whose weight is not fused, or the first one."""
    layers = list(hyper_modules(model))
    return next((one for one in layers if not isinstance(one[1], HyperExpertBank)), layers[0])
