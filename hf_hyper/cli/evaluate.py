"""`hf-hyper eval`: measure perplexity, and the distance to a reference model

Text is cut into windows that do not overlap; every option that the numbers depend on is in the JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_hyper.cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["add", "run"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="Hub id, local folder or .gguf file")
    parser.add_argument("--reference", metavar="REF", help="model to compare with, named like MODEL")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", help="UTF-8 text (default: the one that comes with the package)")
    text.add_argument("--dataset", metavar="NAME", help="wikitext-2, or NAME:CONFIG:SPLIT of a data set")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens a window (default: 2048)")
    parser.add_argument("--sequences", type=int, metavar="N", help="number of windows (default: all)")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="dtype to compute in (default: auto)")
    parser.add_argument("--device", default="auto", help="where to run, e.g. cpu or cuda (default: auto)")
    parser.add_argument("--json", metavar="OUT", help="also write the numbers to this file")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write JSON if asked."""
    for name, value, least in (("--seq-len", arguments.seq_len, 2), ("--sequences", arguments.sequences, 1)):
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}, wanted {least} or more")
    if arguments.text is not None and not Path(arguments.text).is_file():
        raise UsageError(f"--text {arguments.text} is not a file; give a UTF-8 text file, or a data set with --dataset")

    import torch

    from hf_hyper.cli.models import load, stored_bytes
    from hf_hyper.eval import evaluate_model, load_text, windows
    from hf_hyper.pipeline.compress import pick_device
    from hf_hyper.pipeline.report import summarize, write_json

    text = load_text(arguments.text or arguments.dataset)
    device = pick_device(arguments.device)
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    model, tokenizer = load(arguments.model, dtype=dtype, device=device)
    reference = None
    if arguments.reference is not None:
        reference, _ = load(arguments.reference, dtype=dtype, device=device)
    seq_len = _fitting(arguments.seq_len, [model, reference])
    ids = windows(tokenizer, text, seq_len, arguments.sequences)
    result = evaluate_model(model, ids, reference)
    values = {
        "model": arguments.model,
        "reference": arguments.reference,
        "text": arguments.text or arguments.dataset or "bundled",
        **_protocol(text, model, len(ids)),
        **result.to_dict(),
        "bits_per_weight": summarize(model).bits_per_weight,
        "size_bytes": stored_bytes(arguments.model, model),
    }
    _show(values)
    if arguments.json is not None:
        write_json(arguments.json, values)


def _fitting(seq_len: int, models: list[PreTrainedModel | None]) -> int:
    """`seq_len`, or the shortest context of the models if that is less."""
    contexts = [getattr(each.config.get_text_config(), "max_position_embeddings", None) for each in models if each]
    longest = min((context for context in contexts if context), default=seq_len)
    if seq_len > longest:
        print(f"note: windows of {longest} tokens, the model's context, instead of {seq_len}", file=sys.stderr)
    return min(seq_len, longest)


def _protocol(text: str, model: PreTrainedModel, sequences: int) -> dict[str, Any]:
    """What a measurement must say to be repeatable."""
    import hashlib
    from importlib.metadata import version

    return {
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "sequences": sequences,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "versions": {name: version(name) for name in ("hf-hyper", "transformers", "torch")},
    }


def _show(values: dict[str, Any]) -> None:
    print(f"text              {values['text']}: {values['sequences']} windows of {values['seq_len']} tokens")
    print(f"perplexity        {values['ppl']:.4f}")
    if values["bits_per_weight"] is not None:
        print(f"bits per weight   {values['bits_per_weight']:.3f}")
    print(f"size              {values['size_bytes'] / 1e6:.2f} MB")
    if "kl_mean" not in values:
        return
    print(f"reference         {values['reference']}: perplexity {values['ref_ppl']:.4f}")
    print(f"KL (nats)         mean {values['kl_mean']:.5f}, 99% {values['kl_p99']:.4f}, max {values['kl_max']:.4f}")
    print(f"same top token    {values['top1']:.2%}")
