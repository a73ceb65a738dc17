"""Products with the weights of several experts, expert by expert.

A router sends every row of activations to one expert. Rows are gathered by expert, and one product of the weight alone
serves all rows of an expert; experts without rows are not touched. Which experts these are must be known before the
products can start, so on a GPU this waits for the device.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from hf_hyper.routing import rows_by_expert
from hf_hyper.scheme import TensorScheme

__all__ = ["by_expert"]

Product = Callable[[Tensor, Mapping[str, Tensor], TensorScheme], Tensor]


def by_expert(product: Product) -> Callable[[Tensor, Tensor, Mapping[str, Tensor], TensorScheme], Tensor]:
    """The operator `matmul_experts` made of an implementation of `matmul`."""

    def multiply(x: Tensor, ids: Tensor, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
        y = x.new_zeros(len(x), scheme.out_features)
        for expert, rows in rows_by_expert(ids, len(tensors["codes"])):
            y[rows] = product(x[rows], {name: tensor[expert] for name, tensor in tensors.items()}, scheme)
        return y

    return multiply
