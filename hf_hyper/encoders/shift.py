"""Encoder of `shift`: scale the rows, search every tile, refit the scales.

The search is a tail-biting Viterbi over the 2^16 windows, native when the compiled core is there and in torch
(`viterbi.py`, the same integers, so the same bytes) when it is not. Efforts are points on its curve of error against
speed (`hf_hyper.bench.shift_mse`); they never change the format. GPUs, through Triton, search all states whatever the
effort: the bytes are those of `best`. Up to 4 bits nothing waits for them on the way; above, tails are searched again
where there are any, which the host must know.
"""

import math

import torch
from torch import Tensor

from hf_hyper import _native, _triton
from hf_hyper.encoders.viterbi import encode_tiles_reference
from hf_hyper.errors import ShapeError
from hf_hyper.hyperfunctions.shift import MULTIPLIER, STATE_BITS, TILE_WEIGHTS, states, values
from hf_hyper.scheme import TILE, TensorScheme

__all__ = ["DISTORTION", "SURVIVOR_BITS", "decode_tiles", "encode_shift", "encode_tiles", "first_scale", "stored_scale"]

SURVIVOR_BITS = {
    "fast": {1: 10, 2: 12, 3: 12, 4: 12, 5: 12, 6: 12, 7: 14, 8: 16},
    "balanced": {1: 12, 2: 16, 3: 16, 4: 13, 5: 14, 6: 14, 7: 14, 8: 16},
    "best": dict.fromkeys(range(1, 9), STATE_BITS),
}
"""Width of the search by effort and bits: 2^width branches are weighed per weight. A search of 15 takes longer than the
full one of 16, which looks nothing up. Errors and speeds: `hf_hyper.bench.shift_mse`."""

GAIN = {1: 0.872, 2: 1.013, 3: 1.064, 4: 1.097, 5: 1.139, 6: 1.183, 7: 1.225, 8: 1.258}
"""Row scale over root mean square for least error on Gaussian rows, by bits: centroids lie inside their cells at low
rates, and the byte sum ends at 3.4 deviations, which costs most at high rates. Source: `hf_hyper.bench.shift_mse`."""

DISTORTION = {1: 0.271, 2: 0.0693, 3: 0.0177, 4: 0.00454, 5: 0.00117, 6: 0.000305, 7: 0.0000821, 8: 0.0000227}
"""Mean squared error on Gaussian rows of variance one by bits, full search. Source: `hf_hyper.bench.shift_mse`."""

WIDENING, MAX_WIDENINGS = 1.1, 16
"""Steps by which the scale of a row with longer tails than a Gaussian may grow, and how many are tried."""

LARGEST_VALUE = 3.3
"""Where the values of `shift` end on the nearer side, in deviations."""

GPU_TILES = 1 << 14
"""Tiles of a GPU packed and unpacked at a time; bounds the memory beside the weight."""

SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 65504.0


def encode_shift(weight: Tensor, scheme: TensorScheme, effort: str) -> dict[str, Tensor]:
    """Tensors of `hyperfunctions.shift.Shift` for one weight matrix; see `encoders.encode`."""
    bits = int(scheme.bits)
    if not scheme.incoherence:
        rows, columns = scheme.padded_out - scheme.out_features, scheme.padded_in - scheme.in_features
        weight = torch.nn.functional.pad(weight, (0, columns, 0, rows))
    scale = first_scale(weight, bits)
    unit = weight / torch.where(scale > 0, scale, 1.0).unsqueeze(1)
    tiles = unit.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2)  # [out_tiles, in_tiles, 16, 16]
    codes = encode_tiles(tiles.reshape(-1, TILE_WEIGHTS), bits, effort)
    decoded = decode_tiles(codes, bits).view(tiles.shape)
    value = decoded.transpose(1, 2).reshape(weight.shape)
    fitted = (weight * value).sum(1) / value.square().sum(1)
    return {
        "codes": codes.view(scheme.padded_out // TILE, scheme.padded_in // TILE, 8 * bits),
        "scale": stored_scale(fitted),
    }


def first_scale(weight: Tensor, bits: int) -> Tensor:
    """Scale of every row with which the search starts, `[rows, columns]` to `[rows]`; zero for rows of zeros.

    Raises:
        ShapeError: A row is too small or too large for a 16-bit scale.
    """
    deviation = weight.square().mean(1).sqrt()
    _check_range(deviation)
    return deviation * GAIN[bits] * _widening(weight, deviation * GAIN[bits], bits)


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as they are stored: float16, limited to its finite values."""
    return scale.clamp(-LARGEST_SCALE, LARGEST_SCALE).half()


def encode_tiles(tiles: Tensor, bits: int, effort: str = "balanced") -> Tensor:
    """Bit string of the orbit closest to every tile.

    Args:
        tiles: `[n, 256]` float32 in units of `values`, row-major over 16 x 16.
        bits: Bits per weight, 1 to 8.
        effort: `fast`, `balanced` or `best`.

    Returns:
        `[n, 8 * bits]` int32, on the device of `tiles`. The same for any number of threads and on any machine, except
        that GPUs give at any effort what CPUs give at `best`.
    """
    if tiles.is_cuda:
        if _triton.obstacle() is None:
            return _encode_on_gpu(tiles, bits)
        _triton.say_if_absent()
    survivor_bits = SURVIVOR_BITS[effort][bits]
    on_cpu = tiles.float().cpu().contiguous()
    if _native.load() is None:
        _native.say_if_absent()
        codes = encode_tiles_reference(on_cpu, bits, survivor_bits, MULTIPLIER)
    else:
        codes = _native.shift_encode(on_cpu, bits, survivor_bits, MULTIPLIER)
    return codes.to(tiles.device)


def _encode_on_gpu(tiles: Tensor, bits: int) -> Tensor:
    from hf_hyper._triton.shift_encode import full_search

    parts = tiles.float().split(GPU_TILES)
    return torch.cat([encode_tiles_reference(part, bits, STATE_BITS, MULTIPLIER, full_search) for part in parts])


def decode_tiles(codes: Tensor, bits: int) -> Tensor:
    """Values of bit strings: `[n, 8 * bits]` int32 to `[n, 256]` float32."""
    if codes.device.type == "cpu" and _native.load() is not None:
        return _native.shift_decode(codes, bits, MULTIPLIER)
    table = values(codes.device)
    return torch.cat([table[states(part, bits)] for part in codes.split(GPU_TILES)])


def _widening(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Factor per row that balances the error inside the range of values against what lies beyond it: `[rows]`.

    With scale s the first is about s² · 4^-bits a weight and the second the squared distance to 3.3 s. Rows that end
    inside the range keep their scale.
    """
    factors = torch.ones_like(scale)
    reach = LARGEST_VALUE * scale
    overshoot = torch.where(reach > 0, weight.abs().amax(1) / reach, 0.0)
    rows = (overshoot > 1).nonzero().squeeze(1)
    if not len(rows):
        return factors
    tails, scales = weight[rows].abs(), scale[rows]
    steps = min(MAX_WIDENINGS, 1 + math.ceil(math.log(float(overshoot.max())) / math.log(WIDENING)))
    candidates = WIDENING ** torch.arange(steps, dtype=weight.dtype, device=weight.device)
    error = []
    for factor in candidates.tolist():
        beyond = (tails - (factor * reach[rows]).unsqueeze(1)).clamp_(min=0).square_().mean(1)
        error.append(beyond + (factor * scales).square() * 1.2 * 4.0**-bits)
    factors[rows] = candidates[torch.stack(error).argmin(0)]
    return factors


def _check_range(deviation: Tensor) -> None:
    outside = (deviation > LARGEST_SCALE) | ((deviation > 0) & (deviation < SMALLEST_SCALE))
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise ShapeError(
            f"row {row} has root mean square {float(deviation[row]):.3g}, wanted 0 or {SMALLEST_SCALE:.3g} to "
            f"{LARGEST_SCALE:.3g}; scale the weight or encode it with incoherence"
        )
