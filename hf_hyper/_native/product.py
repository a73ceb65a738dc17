"""The call that all products of activations with stored weights share."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hf_hyper._native.arguments import DTYPES, activations
from hf_hyper._native.library import check, require, thread_count

__all__ = ["multiply"]


class Plan(Protocol):
    """Shape and constants of a weight, as the core reads them at `address`."""

    out_features: int
    in_features: int
    address: int


def multiply(
    name: str, plan: Plan, tensors: Sequence[Tensor], x: Tensor, threads: int | None, *options: bool
) -> Tensor:
    """What `hyper_{name}` of `csrc/hyper.h` makes of activations.

    Args:
        name: Of the function, without its prefix.
        plan: Of the weight.
        tensors: Stored tensors of the weight, checked and contiguous, in the order of the function.
        x: `[tokens, in_features]` float32, bfloat16 or float16.
        threads: Threads to use; `torch.get_num_threads()` where it is None.
        *options: Of the function, between the number of tokens and that of threads.

    Returns:
        `[tokens, out_features]`, dtype of `x`.

    Raises:
        ShapeError: `x` has another shape.
        ConfigError: `x` has another dtype or lies on another device.
        HyperError: The core refuses.
        KernelUnavailable: There is no compiled core.
    """
    function = getattr(require(), f"hyper_{name}")
    x = activations(x, plan.in_features)
    tokens = x.shape[0]
    y = x.new_empty(tokens, plan.out_features)
    addresses = [tensor.data_ptr() for tensor in tensors]
    result = function(
        plan.address, *addresses, x.data_ptr(), DTYPES[x.dtype], tokens, *options, thread_count(threads), y.data_ptr()
    )
    check(result, name)
    return y
