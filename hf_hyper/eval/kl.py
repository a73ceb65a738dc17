"""How far a model's next-token distributions are from those of a reference, token by token.

Perplexity compares a model with the text and can hide damage that cancels on average; the Kullback-Leibler divergence
compares it with the model it was made from and is zero only where nothing changed. Its tail (99th percentile, maximum)
tells whether the loss is even or sits on few tokens, and top-1 agreement is what greedy decoding would notice.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["token_divergence"]

# Rows of logits worked on at a time are chosen so that one float32 copy takes about 64 MB.
CHUNK_ELEMENTS = 1 << 24


def token_divergence(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL(reference || model) of every token in nats, and whether both models prefer the same token.

    Log-softmax and the sum over the vocabulary run in float32 whatever the dtype of the logits. Identical logits give
    exactly zero; a value of about -1e-7 is rounding.

    Args:
        reference: `[tokens, vocabulary]` logits of the reference model.
        logits: `[tokens, vocabulary]` logits of the model, on the same device.

    Returns:
        `[tokens]` float32 divergence in nats, and `[tokens]` bool, True where the two arg-maxima agree.

    Source: llama.cpp `perplexity --kl-divergence` reports the same quantities.
    """
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    divergence, agree = [], []
    for ours, theirs in zip(logits.split(rows), reference.split(rows), strict=True):
        log_p = torch.log_softmax(theirs.float(), dim=-1)
        log_q = torch.log_softmax(ours.float(), dim=-1)
        divergence.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
        agree.append(log_p.argmax(dim=-1) == log_q.argmax(dim=-1))
    return torch.cat(divergence), torch.cat(agree)
