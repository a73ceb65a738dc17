"""Quantize one weight with what calibration knows of its layer.

The same stored tensors as `codec.quantize`, found differently: tile by tile with feedback, then the scales fitted
again, all in the metric of the layer's second moments. Plain LDLQ is the case without gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_hyper import codec
from hf_hyper.encoders.shift import decode_tiles, encode_tiles, first_scale, stored_scale
from hf_hyper.errors import ConfigError
from hf_hyper.rotation.incoherence import rotate_input, rotate_output, rotate_weight, unrotate_output
from hf_hyper.rounding.feedback import round_with_feedback
from hf_hyper.rounding.moments import Moment, block_factor, both_sides, regularized, trust
from hf_hyper.rounding.scales import fit_scales
from hf_hyper.scheme import TILE, TensorScheme

__all__ = ["Knowledge", "output_error", "quantize_calibrated"]


PLAIN_DAMPING = 0.01


@dataclass(frozen=True)
class Knowledge:
    """What calibration knows of one linear layer.

    Attributes:
        inputs: Second moment of the inputs, perhaps weighed by token, width `in_features`.
        outputs: Second moment of the loss gradients at the outputs, width `out_features`; None where none were taken.
    """

    inputs: Moment
    outputs: Moment | None = None


def quantize_calibrated(
    weight: Tensor,
    scheme: TensorScheme,
    effort: str,
    knowledge: Knowledge,
    *,
    plain: bool = False,
    name: str = "weight",
) -> dict[str, Tensor]:
    """Store one weight matrix so that the layer's outputs, rather than its weights, stay close.

    Args:
        weight: `[out_features, in_features]` floating point.
        scheme: How to store it; `shift` with incoherence.
        effort: Thoroughness of the search: `fast`, `balanced` or `best`.
        knowledge: Of this layer.
        plain: LDLQ as published and nothing else: 1 % of the mean diagonal as damping, scales that are not refitted,
            gradients not looked at. The baseline of `hf_hyper.bench.quality`.
        name: What errors call the tensor.

    Returns:
        Tensors as `codec.tensor_specs(scheme)` lists them, on the weight's device.

    Raises:
        ConfigError: The scheme's hyperfunction has no tiles to carry errors between.
        ShapeError: As `codec.quantize`.
    """
    if scheme.hyperfunction != "shift" or not scheme.incoherence:
        raise ConfigError(
            f"{name}: calibrated rounding needs hyperfunction 'shift' with incoherence, got {scheme.hyperfunction!r}; "
            "leave calibration out"
        )
    bits = int(scheme.bits)
    weight = codec.checked(weight, scheme, name)
    out_scale, unit = codec.split_rows(weight)
    rotated = rotate_weight(unit, scheme)
    inputs, input_factor = _input_metric(knowledge.inputs, scheme, PLAIN_DAMPING if plain else None)
    outputs = None
    if knowledge.outputs is not None and not plain:
        outputs = _output_metric(knowledge.outputs, out_scale.float(), scheme)

    def encode(tiles: Tensor) -> tuple[Tensor, Tensor]:
        codes = encode_tiles(tiles, bits, effort)
        return codes, decode_tiles(codes, bits)

    first = first_scale(rotated, bits)
    codes, values = round_with_feedback(
        rotated,
        first,
        encode,
        input_factor,
        None if outputs is None else block_factor(outputs, TILE),
    )
    if plain:
        return {"codes": codes, "scale": stored_scale(first), codec.OUT_SCALE: out_scale}
    scale = stored_scale(fit_scales(rotated, values, inputs, outputs))
    # The rows as they were before the output rotation can be fitted once more.
    decoded = unrotate_output((values * scale.float().unsqueeze(1)).T, scheme).T
    wanted = unrotate_output(rotated.T, scheme).T * out_scale.float().unsqueeze(1)
    fitted = codec.stored_out_scale(fit_scales(wanted, decoded, inputs))
    return {"codes": codes, "scale": scale, codec.OUT_SCALE: torch.where(out_scale > 0, fitted, out_scale)}


def output_error(weight: Tensor, decoded: Tensor, inputs: Moment) -> float:
    """`E|(W - W') x|² / E|W x|²`, 0 for outputs that are all zero.

    Args:
        weight: W, `[out_features, in_features]`.
        decoded: W', as large.
        inputs: Second moment of x.
    """
    moment = inputs.mean()
    error = weight.float() - decoded.float()
    energy = float(((weight.float() @ moment) * weight.float()).sum())
    return float(((error @ moment) * error).sum()) / energy if energy > 0 else 0.0


def _input_metric(moment: Moment, scheme: TensorScheme, damping: float | None) -> tuple[Tensor, Tensor]:
    """Moment of the rotated inputs, regularized, and its factor: both `[padded_in, padded_in]`.

    Weights that share their inputs share them too: they stay with the moment.
    """
    key = (scheme.padded_in, scheme.input_blocks, scheme.seed, damping)
    if key not in moment.derived:
        halves = tuple(both_sides(half, lambda x: rotate_input(x, scheme)) for half in moment.halves)
        metric = _metric(halves, moment.counts, damping)
        moment.derived[key] = metric, block_factor(metric, TILE)
    return moment.derived[key]


def _output_metric(moment: Moment, out_scale: Tensor, scheme: TensorScheme) -> Tensor:
    """Moment of the gradients at the rotated outputs in units of `out_scale`, regularized: `[padded_out] * 2`."""
    halves = tuple(both_sides(half, lambda y: rotate_output(y * out_scale, scheme)) for half in moment.halves)
    return _metric(halves, moment.counts)


def _metric(halves: tuple[Tensor, ...], counts: Sequence[int], damping: float | None = None) -> Tensor:
    first, second = halves
    mean = (first * counts[0] + second * counts[1]) / max(sum(counts), 1)
    return regularized(mean, trust((first, second), TILE) if damping is None else damping)
