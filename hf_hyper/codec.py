"""A whole weight matrix to stored tensors and back.

    quantize:    weight -> divide rows by `out_scale` -> signs and rotations -> encode -> tensors
    dequantize:  tensors -> decode -> inverse rotations and signs -> multiply rows by `out_scale` -> weight

`out_scale` gives every output row its own unit before the rotation mixes rows, so that a zero row stays zero and a row
a million times larger than its neighbours does not drown them. It exists only with incoherence, because without it
rows are not mixed.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hf_hyper import hyperfunctions
from hf_hyper.encoders import encode
from hf_hyper.errors import ShapeError
from hf_hyper.hyperfunctions import TensorSpec
from hf_hyper.rotation.incoherence import output_block, rotate_weight, unrotate_rows, unrotate_weight
from hf_hyper.scheme import TILE, TensorScheme

__all__ = [
    "OUT_SCALE",
    "apply_out_scale",
    "bits_per_weight",
    "checked",
    "dequantize",
    "dequantize_rows",
    "quantize",
    "relative_error",
    "split_rows",
    "stacked",
    "stored_out_scale",
    "tensor_specs",
]

OUT_SCALE = "out_scale"
_SMALLEST = 2.0**-133  # least positive bfloat16
_LARGEST = float(torch.finfo(torch.bfloat16).max)


def tensor_specs(scheme: TensorScheme) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of all tensors that store one weight, in the order in which kernels take them."""
    specs = hyperfunctions.get(scheme.hyperfunction).tensors(scheme)
    if scheme.incoherence:
        specs[OUT_SCALE] = TensorSpec((scheme.out_features,), torch.bfloat16)
    return specs


def stored_out_scale(scale: Tensor) -> Tensor:
    """Scales of output rows as they are stored: bfloat16, limited to its finite values."""
    return scale.clamp(-_LARGEST, _LARGEST).bfloat16()


def bits_per_weight(scheme: TensorScheme) -> float:
    """Stored bits per weight with every overhead: codes, scales, constants and padding."""
    return 8 * sum(spec.num_bytes for spec in tensor_specs(scheme).values()) / scheme.num_weights


def quantize(
    weight: Tensor, scheme: TensorScheme, effort: str = "balanced", *, name: str = "weight"
) -> dict[str, Tensor]:
    """Store one weight matrix.

    Args:
        weight: `[out_features, in_features]` floating point.
        scheme: How to store it.
        effort: Thoroughness of the search: `fast`, `balanced` or `best`.
        name: What errors call the tensor.

    Returns:
        Tensors as `tensor_specs(scheme)` lists them, on the weight's device.

    Raises:
        ShapeError: The shape is not the scheme's, or a value is NaN, infinite or outside float32.
    """
    weight = checked(weight, scheme, name)
    if not scheme.incoherence:
        return encode(weight, scheme, effort)
    out_scale, unit = split_rows(weight)
    return {**encode(rotate_weight(unit, scheme), scheme, effort), OUT_SCALE: out_scale}


def checked(weight: Tensor, scheme: TensorScheme, name: str) -> Tensor:
    """The weight in float32.

    Raises:
        ShapeError: The shape is not the scheme's, or a value is NaN, infinite or outside float32.
    """
    wanted = (scheme.out_features, scheme.in_features)
    if tuple(weight.shape) != wanted:
        raise ShapeError(f"{name}: shape {tuple(weight.shape)}, wanted {wanted}; build the scheme from this tensor")
    weight = weight.detach().float()
    if not bool(weight.isfinite().all()):
        row, column = (int(i) for i in (~weight.isfinite()).nonzero()[0])
        raise ShapeError(
            f"{name}: {float(weight[row, column])} at row {row}, column {column}, wanted finite float32 values; "
            "repair the checkpoint or leave the module out with modules_to_not_convert"
        )
    return weight


def split_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`out_scale` `[out_features]` bfloat16 of a weight, and the weight with its rows divided by it."""
    out_scale = _row_scale(weight)
    divisor = out_scale.float().unsqueeze(1)
    return out_scale, torch.where(divisor > 0, weight / divisor, 0.0)


def stacked(tensors: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stored tensors of single matrices of one scheme as those of a bank of experts: one more dimension in front."""
    parts = list(tensors)
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def dequantize(tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """The weight that stored tensors stand for.

    Args:
        tensors: As `tensor_specs(scheme)` lists them, all on one device.
        scheme: How they are stored.

    Returns:
        `[out_features, in_features]` float32.
    """
    decoded = hyperfunctions.get(scheme.hyperfunction).decode(tensors, scheme)
    if not scheme.incoherence:
        return decoded
    return apply_out_scale(unrotate_weight(decoded, scheme), tensors[OUT_SCALE])


def dequantize_rows(tensors: Mapping[str, Tensor], scheme: TensorScheme, rows: Tensor) -> Tensor:
    """Some rows of the weight; only the blocks of rows that were rotated together with them are decoded.

    Args:
        tensors: As `tensor_specs(scheme)` lists them.
        scheme: How they are stored.
        rows: `[n]` int64 row numbers in `[0, out_features)`.

    Returns:
        `[n, in_features]` float32.
    """
    hyperfunction = hyperfunctions.get(scheme.hyperfunction)
    height = output_block(scheme) if scheme.incoherence else TILE
    blocks, place = (rows // height).unique(return_inverse=True)
    every = (blocks.unsqueeze(1) * height + torch.arange(height, device=rows.device)).flatten()
    taken, part = hyperfunction.take(tensors, scheme, every[::TILE] // TILE)
    decoded = hyperfunction.decode(taken, part)
    if not scheme.incoherence:
        return decoded[place * height + rows % height]
    unit = unrotate_rows(decoded, scheme, every)[place * height + rows % height]
    return apply_out_scale(unit, tensors[OUT_SCALE][rows])


def relative_error(weight: Tensor, decoded: Tensor) -> float:
    """`||W - W'||² / ||W||²` of a weight and its stored form, 0 for a weight of zeros."""
    largest = weight.abs().amax().float()
    if largest == 0:
        return 0.0
    # Divided first: squares of the largest float32 values overflow.
    unit = weight.float() / largest
    return float((decoded / largest - unit).square().sum() / unit.square().sum())


def apply_out_scale(unit: Tensor, out_scale: Tensor) -> Tensor:
    """Rows of `unit` `[out_features, in_features]` times `out_scale` `[out_features]`, limited to finite float32."""
    largest = torch.finfo(torch.float32).max
    return (unit * out_scale.float().unsqueeze(1)).clamp(-largest, largest)


def _row_scale(weight: Tensor) -> Tensor:
    """Root mean square of every row as bfloat16, zero only for rows of zeros."""
    largest = weight.abs().amax(1, keepdim=True)
    relative = torch.where(largest > 0, weight / largest, 0.0)
    scale = largest.squeeze(1) * relative.square().mean(1).sqrt()
    rounded = stored_out_scale(scale)
    return torch.where((largest.squeeze(1) > 0) & (rounded == 0), torch.full_like(rounded, _SMALLEST), rounded)
