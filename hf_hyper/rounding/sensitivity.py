"""What coding a weight will cost, before it is coded.

A code of b bits leaves noise that is white in the rotated basis, D(b) times the variance of the weights. Feedback with
the factors of both moments spreads it, and what it does to the loss is close to half of

    tokens * D(b) * variance * tr(L_I^-1 I L_I^-T) * tr(L_O^-1 O L_O^-T) * accumulation

Moments see one token at a time. Where attention gathers the outputs of many tokens (`v_proj` above all), one noise in
the weight moves them all alike, and what it does to the loss adds up: that is the last factor.

Against the divergence measured with one tensor of stories260K compressed, at 3 bits, it is 1.4 times too small in the
mean and scatters by a factor of 1.2 (one deviation, 35 tensors, 2k tokens).
"""

import torch
from torch import Tensor

from hf_hyper import codec
from hf_hyper.rotation.incoherence import rotate_input, rotate_output, rotate_weight
from hf_hyper.rounding.calibrated import Knowledge
from hf_hyper.rounding.experts import ExpertKnowledge
from hf_hyper.rounding.moments import both_sides, left_by_feedback
from hf_hyper.scheme import TILE, TensorScheme

__all__ = ["sensitivity"]


@torch.no_grad()
def sensitivity(
    weight: Tensor, scheme: TensorScheme, knowledge: Knowledge | ExpertKnowledge, *, name: str = "weight"
) -> float:
    """Damage to a text for every unit of the code's distortion (`encoders.shift.DISTORTION`).

    Args:
        weight: `[out_features, in_features]`, with the number of experts in front for a bank of experts.
        scheme: How it will be stored; its bits do not matter.
        knowledge: Of this weight, with gradients.
        name: What errors call the tensor.

    Returns:
        Twice the divergence in nats, summed over the rows that the moments have seen.

    Raises:
        ShapeError: As `codec.quantize`.
    """
    if isinstance(knowledge, Knowledge):
        return sum(knowledge.inputs.counts) * _damage_a_row(weight, scheme, knowledge, name)
    return sum(
        knowledge.inputs.count(expert) * _damage_a_row(own, scheme, known, f"{name}[{expert}]")
        for expert, (own, known) in enumerate(zip(weight, knowledge.by_expert(), strict=True))
    )


def _damage_a_row(weight: Tensor, scheme: TensorScheme, knowledge: Knowledge, name: str) -> float:
    assert knowledge.outputs is not None
    out_scale, unit = codec.split_rows(codec.checked(weight, scheme, name))
    scale = out_scale.float()
    inputs = both_sides(knowledge.inputs.mean(), lambda x: rotate_input(x, scheme))
    outputs = both_sides(knowledge.outputs.mean(), lambda y: rotate_output(y * scale, scheme))
    variance = float(rotate_weight(unit, scheme).square().mean())
    return variance * left_by_feedback(inputs, TILE) * left_by_feedback(outputs, TILE) * knowledge.accumulation
