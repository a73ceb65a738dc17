"""Perplexity of a causal language model, and its distance to a reference model, in one pass over the text.

Every window is run through the model and, where one is given, through the reference. What is kept is a few float32
numbers a token, never the logits of the text. Windows are independent: the first token of each has no prediction, so
`seq_len - 1` tokens a window count.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_hyper.errors import ConfigError
from hf_hyper.eval.kl import CHUNK_ELEMENTS, token_divergence

__all__ = ["EvalResult", "evaluate_model", "noise_floor"]


@dataclass(frozen=True)
class EvalResult:
    """Quality of a model on a text.

    Attributes:
        ppl: Perplexity, `exp(nll)`.
        nll: Mean negative log-likelihood of a token, in nats.
        tokens: Predicted tokens, `windows * (seq_len - 1)`.
        seq_len: Tokens a window.
        kl_mean: Mean KL(reference || model) of a token in nats; None without a reference, like all that follow.
        kl_p99: 99th percentile of the divergence over the tokens.
        kl_max: Largest divergence of a token.
        top1: Share of tokens, 0 to 1, for which both models prefer the same next token.
        ref_ppl: Perplexity of the reference on the same tokens.
    """

    ppl: float
    nll: float
    tokens: int
    seq_len: int
    kl_mean: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    ref_ppl: float | None = None

    def to_dict(self) -> Mapping[str, float | int]:
        """The measured values by name, ready for JSON; those that need a reference are absent without one."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@torch.inference_mode()
def evaluate_model(
    model: PreTrainedModel, windows: Tensor, reference: PreTrainedModel | None = None, batch_size: int = 1
) -> EvalResult:
    """Measure a model on windows of tokens, and against a reference if one is given.

    Both models are switched to evaluation mode for the pass and back after it. They may sit on different devices and
    have different dtypes; log-softmax runs in float32 and means are taken in float64.

    Args:
        model: Causal language model whose output has `logits`.
        windows: `[n, seq_len]` int64 token ids, as `hf_hyper.eval.windows` returns them.
        reference: The model to compare with; it must share the vocabulary.
        batch_size: Windows run at a time; memory grows as `batch_size * seq_len * vocabulary`.

    Raises:
        ConfigError: The windows have a wrong shape, are longer than the model's context or hold ids beyond its
            vocabulary, `batch_size` is below 1, or the two vocabularies differ.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; give 1 or more")
    _check_windows(model, windows)
    training = [(each, each.training) for each in (model, reference) if each is not None]
    nll: list[Tensor] = []
    ref_nll: list[Tensor] = []
    divergence: list[Tensor] = []
    agree = 0
    try:
        for each, _ in training:
            each.eval()
        # disable=None: no bar when the output is not a terminal.
        for batch in logging.tqdm(windows.split(batch_size), desc="Evaluating", unit="batch", disable=None):
            logits = _predictions(model, batch)
            targets = batch[:, 1:].reshape(-1)
            nll.append(_token_nll(logits, targets))
            if reference is None:
                continue
            expected = _predictions(reference, batch).to(logits.device)
            if expected.shape != logits.shape:
                raise ConfigError(
                    f"the reference predicts {expected.shape[-1]} tokens and the model {logits.shape[-1]}; compare "
                    "models with the same vocabulary"
                )
            ref_nll.append(_token_nll(expected, targets))
            divergences, same = token_divergence(expected, logits)
            divergence.append(divergences.cpu())
            agree += int(same.sum())
    finally:
        for each, mode in training:
            each.train(mode)
    mean_nll = _mean(nll)
    tokens = sum(part.numel() for part in nll)
    result = EvalResult(ppl=_exp(mean_nll), nll=mean_nll, tokens=tokens, seq_len=windows.shape[1])
    if reference is None:
        return result
    values = torch.cat(divergence).numpy()
    return EvalResult(
        ppl=result.ppl,
        nll=result.nll,
        tokens=tokens,
        seq_len=result.seq_len,
        kl_mean=float(values.mean(dtype=np.float64)),
        kl_p99=float(np.quantile(values, 0.99)),
        kl_max=float(values.max()),
        top1=agree / tokens,
        ref_ppl=_exp(_mean(ref_nll)),
    )


def noise_floor(
    model: PreTrainedModel, windows: Tensor, dtype: torch.dtype = torch.bfloat16, batch_size: int = 1
) -> EvalResult:
    """Distance of a model to its own copy in another dtype: a KL below this says nothing about a compression.

    Args:
        model: The reference model; a copy of it in `dtype` is made and dropped.
        windows: `[n, seq_len]` int64 token ids.
        dtype: Dtype in which the copy computes.
        batch_size: As in `evaluate_model`.

    Raises:
        ConfigError: As `evaluate_model`.
    """
    rounded = copy.deepcopy(model).to(dtype)  # pyright: ignore[reportArgumentType]
    return evaluate_model(rounded, windows, model, batch_size)


def _check_windows(model: PreTrainedModel, windows: Tensor) -> None:
    if windows.ndim != 2 or windows.dtype != torch.int64 or not windows.numel():
        raise ConfigError(
            f"windows have shape {list(windows.shape)} and dtype {windows.dtype}; wanted [n, seq_len] of torch.int64 "
            "with n of 1 or more, see hf_hyper.eval.windows"
        )
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and windows.shape[1] > context:
        raise ConfigError(f"seq_len is {windows.shape[1]} and the context of the model is {context}; lower seq_len")
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if int(windows.max()) >= rows:
        raise ConfigError(
            f"token id {int(windows.max())} is beyond the {rows} rows of the model's embedding; use its own tokenizer"
        )


def _predictions(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Logits of every token but the first of each window, `[windows * (seq_len - 1), vocabulary]`."""
    logits = model(input_ids=batch.to(model.device), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


def _token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, `[tokens]` float32 on the CPU."""
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    parts = [
        torch.nn.functional.cross_entropy(part.float(), target, reduction="none")
        for part, target in zip(logits.split(rows), targets.to(logits.device).split(rows), strict=True)
    ]
    return torch.cat(parts).cpu()


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().mean())


def _exp(nll: float) -> float:
    """`exp(nll)`; infinite where a broken model would overflow."""
    return math.exp(nll) if nll < 700 else math.inf
