"""Peers that see the weights alone: round-to-nearest, bitsandbytes, HQQ."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hf_hyper.bench.peers.base import GROUP_SIZE, Decoded, Task

__all__ = ["hqq", "nf4", "round_to_nearest", "rtn"]


def rtn(task: Task, bits: str) -> Iterator[Decoded]:
    """Every layer under `round_to_nearest`."""
    return _each(task, lambda weight: round_to_nearest(weight, int(bits)))


def round_to_nearest(weight: Tensor, bits: int, group_size: int = GROUP_SIZE) -> tuple[Tensor, int]:
    """Quantize groups of inputs to an asymmetric uniform grid that contains zero, and decode.

    A group is `group_size` weights of one row that follow one another; the last may be shorter. Its scale is rounded to
    float16 before use, its zero point is an integer of `bits` bits.

    Args:
        weight: `[out_features, in_features]` floating point.
        bits: Bits a code, 1 to 8.
        group_size: Weights that share a scale and a zero point.

    Returns:
        The decoded weight, shape and dtype of `weight`, and the number of bits stored for it.
    """
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    # Zeros change no range here, as every range contains zero.
    grouped = nn.functional.pad(weight.float(), (0, groups * group_size - columns)).view(rows, groups, group_size)
    top = 2**bits - 1
    low, high = grouped.amin(dim=-1, keepdim=True).clamp(max=0), grouped.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).half().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round(-low / scale).clamp(0, top)
    codes = (torch.round(grouped / scale) + zero).clamp(0, top)
    decoded = ((codes - zero) * scale).view(rows, -1)[:, :columns]
    return decoded.to(weight.dtype), weight.numel() * bits + rows * groups * (16 + bits)


def nf4(task: Task, bits: str, *, nested: bool = False) -> Iterator[Decoded]:
    """Every layer under bitsandbytes' 4-bit NormalFloat; its 16-entry table is not counted.

    Args:
        task: The model.
        bits: `"4"`.
        nested: Quantize the scales again.
    """
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    def quantize(weight: Tensor) -> tuple[Tensor, int]:
        packed, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=GROUP_SIZE, compress_statistics=nested, quant_type="nf4"
        )
        tensors = [packed, state.absmax]
        if state.state2 is not None:
            tensors += [state.state2.absmax, state.offset]
        stored = sum(tensor.numel() * tensor.element_size() * 8 for tensor in tensors)
        return functional.dequantize_4bit(packed, state), stored

    return _each(task, quantize)


def hqq(task: Task, bits: str) -> Iterator[Decoded]:
    """Every layer under half-quadratic quantization; the padding of odd widths to whole words is not counted."""
    from hqq.core.quantize import Quantizer  # pyright: ignore[reportMissingImports]

    def quantize(weight: Tensor) -> tuple[Tensor, int]:
        packed, meta = Quantizer.quantize(
            weight,
            nbits=int(bits),
            channel_wise=True,
            group_size=GROUP_SIZE,
            optimize=True,
            device=str(weight.device),
            compute_dtype=torch.float16,
        )
        scales = meta["scale"].numel() + meta["zero"].numel()
        return Quantizer.dequantize(packed, meta).to(weight.dtype), weight.numel() * int(bits) + 16 * scales

    return _each(task, quantize)


def _each(task: Task, quantize: Callable[[Tensor], tuple[Tensor, int]]) -> Iterator[Decoded]:
    for name, linear in task.linears.items():
        yield name, *quantize(linear.weight.detach())
