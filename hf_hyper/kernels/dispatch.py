"""One table decides which implementation runs: the first row that can, else the reference."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_hyper import _native, _triton
from hf_hyper.hyperfunctions.winding import code_width, dimension, group_size
from hf_hyper.kernels import cpu, cpu_winding, cuda, cuda_experts, cuda_winding, reference
from hf_hyper.kernels.experts import by_expert
from hf_hyper.scheme import TensorScheme

__all__ = ["explain", "has_fast_bfloat16", "select"]


@dataclass(frozen=True)
class Row:
    """One implementation and the cases it covers."""

    operator: str
    device: str
    hyperfunction: str
    name: str
    implementation: Callable[..., Tensor]
    obstacle: Callable[[TensorScheme], str | None]
    """Why it cannot run for a scheme, or None."""


def _needs_core_and_incoherence(scheme: TensorScheme) -> str | None:
    if not scheme.incoherence:
        return "covers weights with incoherence only"
    return _needs_core()


def _needs_core_and_pairs(scheme: TensorScheme) -> str | None:
    if scheme.incoherence:
        return "covers weights without incoherence only"
    if dimension(scheme) != 2 or group_size(scheme):
        return "covers pairs of weights without group scales only"
    if code_width(scheme) > _native.WINDING_MAX_WIDTH:
        return f"covers codes of at most {_native.WINDING_MAX_WIDTH} bits"
    return _needs_core()


def _needs_core() -> str | None:
    return None if _native.load() is not None else f"compiled core absent: {_native.unavailable_reason()}"


_EXPERTS_CPU_SHIFT = by_expert(cpu.matmul_shift)
_EXPERTS_CPU_WINDING = by_expert(cpu_winding.matmul_winding)

TABLE = (
    Row("decode", "cpu", "shift", "cpu.decode_shift", cpu.decode_shift, _needs_core_and_incoherence),
    Row("matmul", "cpu", "shift", "cpu.matmul_shift", cpu.matmul_shift, _needs_core_and_incoherence),
    Row("decode", "cpu", "winding", "cpu.decode_winding", cpu_winding.decode_winding, _needs_core_and_pairs),
    Row("matmul", "cpu", "winding", "cpu.matmul_winding", cpu_winding.matmul_winding, _needs_core_and_pairs),
    Row("decode", "cuda", "shift", "cuda.decode_shift", cuda.decode_shift, cuda.obstacle),
    Row("matmul", "cuda", "shift", "cuda.matmul_shift", cuda.matmul_shift, cuda.obstacle),
    Row("embedding", "cuda", "shift", "cuda.embedding_shift", cuda.embedding_shift, cuda.obstacle),
    Row("decode", "cuda", "winding", "cuda.decode_winding", cuda_winding.decode_winding, cuda_winding.obstacle),
    Row("matmul", "cuda", "winding", "cuda.matmul_winding", cuda_winding.matmul_winding, cuda_winding.obstacle),
    Row(
        "embedding", "cuda", "winding", "cuda.embedding_winding", cuda_winding.embedding_winding, cuda_winding.obstacle
    ),
    Row("matmul_experts", "cpu", "shift", "cpu.matmul_shift", _EXPERTS_CPU_SHIFT, _needs_core_and_incoherence),
    Row("matmul_experts", "cpu", "winding", "cpu.matmul_winding", _EXPERTS_CPU_WINDING, _needs_core_and_pairs),
    Row("matmul_experts", "cuda", "shift", "cuda.matmul_experts_shift", cuda_experts.matmul_shift, cuda.obstacle),
    Row(
        "matmul_experts",
        "cuda",
        "winding",
        "cuda.matmul_experts_winding",
        cuda_winding.matmul_experts_winding,
        cuda_winding.obstacle,
    ),
)

_SAY_IF_ABSENT = {"cpu": _native.say_if_absent, "cuda": _triton.say_if_absent}

_REFERENCE: dict[str, Callable[..., Tensor]] = {
    "decode": reference.decode,
    "matmul": reference.matmul,
    "matmul_experts": reference.matmul_experts,
    "embedding": reference.embedding,
}


def has_fast_bfloat16(device: str) -> bool:
    """Whether products in bfloat16 are faster than in float32 on a kind of device.

    Args:
        device: Device type, such as `cpu`.
    """
    if device == "cpu":
        return _native.load() is not None and _native.dense_tokens() > 0
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def select(operator: str, device: str, scheme: TensorScheme) -> Callable[..., Tensor]:
    """Implementation of an operator.

    Args:
        operator: `decode`, `matmul`, `matmul_experts` or `embedding`.
        device: Device type, such as `cpu`.
        scheme: How the weight is stored.

    Returns:
        A function with the signature of the operator in `kernels.reference`.
    """
    for row in TABLE:
        if (row.operator, row.device, row.hyperfunction) == (operator, device, scheme.hyperfunction):
            if row.obstacle(scheme) is None:
                return row.implementation
            _SAY_IF_ABSENT[device]()
    return _REFERENCE[operator]


def explain(scheme: TensorScheme, device: torch.device | str = "cpu") -> str:
    """Which implementation of every operator runs for a scheme, and why others do not, one line each.

    Args:
        scheme: How the weight is stored; `module.scheme` of a `HyperLinear`.
        device: Where its tensors lie.

    Example:
        >>> print(explain(TensorScheme("winding", 6.5, 64, 64, incoherence=False), "mps"))
        decode on mps: reference.decode
        matmul on mps: reference.matmul
        matmul_experts on mps: reference.matmul_experts
        embedding on mps: reference.embedding
    """
    kind = torch.device(device).type
    lines = []
    for operator in _REFERENCE:
        chosen = select(operator, kind, scheme)
        named = {row.implementation: row.name for row in TABLE}
        line = f"{operator} on {kind}: {named.get(chosen, f'reference.{operator}')}"
        for row in TABLE:
            if (row.operator, row.hyperfunction) == (operator, scheme.hyperfunction) and row.device == kind:
                obstacle = row.obstacle(scheme)
                line += f" ({row.name} {obstacle})" if obstacle else ""
        lines.append(line)
    return "\n".join(lines)
