"""`shift` weights of several experts on GPUs, in Triton.

The launches of `cuda.matmul_shift` with rows sorted by expert in between (`_triton/experts.py`). All experts of a bank
have one scheme, so all rows go through one rotation before the product and one after it; scales are each expert's own.
Nothing waits for the device.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_hyper.hyperfunctions.shift import MULTIPLIER
from hf_hyper.kernels.cuda import _ones, _plan
from hf_hyper.scheme import TensorScheme

__all__ = ["matmul_shift"]


def matmul_shift(x: Tensor, ids: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
    """Every row of `x` times the `shift` weight of its expert; see `reference.matmul_experts`."""
    from hf_hyper._triton import experts, rotation

    if len(x) == 0:
        return x.new_empty(0, scheme.out_features)
    plan, out_scale = _plan(scheme, x.device), tensors["out_scale"]
    parts = 2 if x.dtype == torch.float32 else 1
    rows = x.contiguous() if plan.outer is None else plan.outer.rotated(x)
    rotated, sums, units = rotation.rotate(rows, plan.signs_in, plan.left, plan.right, grouped=True, parts=parts)
    y = experts.products(
        rotated,
        sums,
        ids,
        tensors["codes"].contiguous(),
        tensors["scale"].contiguous(),
        plan.bits,
        MULTIPLIER,
        offset=plan.mean,
        inverse_deviation=plan.inverse_deviation,
    )
    out = torch.empty(len(x), scheme.out_features, dtype=torch.float32, device=x.device)
    rotation.finish(
        y,
        sums,
        units,
        _ones(scheme.padded_out, torch.float16, x.device),
        plan.signs_out,
        _ones(scheme.out_features, torch.bfloat16, x.device),
        plan.hadamard,
        out,
        first=0,
        offset=0.0,
        inverse_deviation=1.0,
    )
    routed = (ids >= 0) & (ids < len(out_scale))
    out *= out_scale[torch.where(routed, ids, 0)].float()
    return torch.where(routed.unsqueeze(1), out, 0.0).to(x.dtype)
