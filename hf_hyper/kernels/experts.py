"""Products with the weights of several experts, expert by expert.

A router sends every row of activations to one expert. Rows are gathered by expert, and one product of the weight alone
serves all rows of an expert; experts without rows are not touched. Which experts these are must be known before the
products can start, so on a GPU this waits for the device.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from hf_hyper.scheme import TensorScheme

__all__ = ["by_expert", "rows_by_expert"]

Product = Callable[[Tensor, Mapping[str, Tensor], TensorScheme], Tensor]


def by_expert(product: Product) -> Callable[[Tensor, Tensor, Mapping[str, Tensor], TensorScheme], Tensor]:
    """The operator `matmul_experts` made of an implementation of `matmul`."""

    def multiply(x: Tensor, ids: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
        y = x.new_zeros(len(x), scheme.out_features)
        for expert, rows in rows_by_expert(ids, len(tensors["codes"])):
            y[rows] = product(x[rows], {name: tensor[expert] for name, tensor in tensors.items()}, scheme)
        return y

    return multiply


def rows_by_expert(ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Every expert that has rows, and which these are in ascending order.

    Args:
        ids: `[rows]` integers; those outside `[0, experts)` belong to no expert.
        experts: Number of experts.
    """
    order = ids.argsort(stable=True)
    borders = torch.arange(experts + 1, dtype=ids.dtype, device=ids.device)
    starts = torch.searchsorted(ids[order], borders).tolist()
    for expert in range(experts):
        if starts[expert] < starts[expert + 1]:
            yield expert, order[starts[expert] : starts[expert + 1]]
