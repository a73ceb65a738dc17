"""`HyperEmbedding`: an `nn.Embedding` whose rows are decoded from a hyperfunction.

Rows are decoded in the blocks that their rotation mixes (up to 128 rows), and only blocks with a row that is asked for
(`hf_hyper::embedding`).
"""

import torch
from torch import Tensor, nn

from hf_hyper.kernels import ops
from hf_hyper.layout import Layout
from hf_hyper.nn.stored import HyperLayer
from hf_hyper.scheme import TensorScheme

__all__ = ["HyperEmbedding"]


class HyperEmbedding(HyperLayer, nn.Embedding):
    """Embedding like `plain`, with empty stored tensors on the meta device.

    Args:
        plain: The layer to replace; its parameters are not read. One with `max_norm` changes its weight while it runs
            and cannot be replaced.
        scheme: How the matrix is stored.
        layout: How the weight becomes that matrix.
        dtype: Dtype of the rows.
    """

    def __init__(self, plain: nn.Embedding, scheme: TensorScheme, layout: Layout, dtype: torch.dtype) -> None:
        settings = (plain.num_embeddings, plain.embedding_dim, plain.padding_idx)
        nn.Embedding.__init__(self, *settings, dtype=dtype, device="meta")
        del self._parameters["weight"]
        self.compute_dtype = dtype
        self.describe(scheme, layout, "meta")

    def forward(self, input: Tensor) -> Tensor:
        """Rows `input` `[...]` of the weight: `[..., embedding_dim]` in `compute_dtype`."""
        if not self.layout.plain:
            return nn.functional.embedding(input, self.dequantize())
        return ops.embedding(input, self.stored(), self._key, self.compute_dtype)

    def plain_layer(self, device: torch.device | str) -> nn.Module:
        """An `nn.Embedding` of the same settings and mode, with new parameters."""
        settings = (self.num_embeddings, self.embedding_dim, self.padding_idx)
        return nn.Embedding(*settings, dtype=self.compute_dtype, device=device).train(self.training)

    def extra_repr(self) -> str:
        """Shape, hyperfunction, bits and stored bits per weight."""
        return f"{super().extra_repr()}, {self._storage_repr()}"
