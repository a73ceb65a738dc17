"""`hyper_fidelity` for the `evaluate` library: distance of a compressed language model to its original.

    measurement = evaluate.load("path/to/hf_hyper/eval/metrics/hyper_fidelity")
    measurement.compute(data=texts, model=compressed, reference=original, tokenizer=tokenizer)

Loading by path needs no network.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_hyper.eval import evaluate_model, windows

_DESCRIPTION = """
Perplexity of a causal language model and its Kullback-Leibler divergence from a reference model, per token and in nats,
on non-overlapping windows of one text.
"""

_INPUTS = """
Args:
    data (list of str): rows of text, joined by a blank line.
    model: the model to measure, loaded.
    tokenizer: its tokenizer.
    reference: the model it was made from; without it only the perplexity is measured.
    seq_len (int): tokens a window, 512 by default.
    sequences (int): number of windows, all that fit by default.
Returns:
    ppl, nll, tokens, seq_len, and with a reference kl_mean, kl_p99, kl_max, top1, ref_ppl.
"""

_CITATION = """
@article{kullback1951information, title={On information and sufficiency}, author={Kullback, S. and Leibler, R. A.},
  journal={The Annals of Mathematical Statistics}, volume={22}, number={1}, pages={79--86}, year={1951}}
"""


class HyperFidelity(evaluate.Measurement):
    """See the module docstring."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        data: list[str],
        model: Any,
        tokenizer: Any,
        reference: Any = None,
        seq_len: int = 512,
        sequences: int | None = None,
    ) -> dict[str, float | int]:
        cut = windows(tokenizer, "\n\n".join(data), seq_len, sequences)
        return dict(evaluate_model(model, cut, reference).to_dict())
