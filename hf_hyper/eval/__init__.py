"""Evaluation: text in windows, perplexity, and distance to a reference model."""

from hf_hyper.eval.data import TextSource, load_text, windows
from hf_hyper.eval.kl import token_divergence
from hf_hyper.eval.perplexity import EvalResult, evaluate_model, noise_floor

__all__ = [
    "EvalResult",
    "TextSource",
    "evaluate_model",
    "load_text",
    "noise_floor",
    "token_divergence",
    "windows",
]
