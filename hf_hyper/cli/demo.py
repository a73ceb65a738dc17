"""`hf-hyper demo`: compress a small language model and compare it with the original

Needs the Hub or a package index once, for SmolLM2-135M-Instruct. The effort is `fast`, to take minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hf_hyper.cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_hyper.config import HyperConfig

__all__ = ["add", "run"]

_PROMPT = "Gravity is the force that"
_NEW_TOKENS = 40
_SEQ_LEN, _SEQUENCES = 512, 4


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--bits", type=float, default=4.0, help="average bits per weight, 1 to 8 (default: 4)")
    parser.add_argument("--keep", metavar="DIR", help="keep the compressed model in this folder")


def run(arguments: argparse.Namespace) -> None:
    """Compress, reload from disk, compare, print."""
    from hf_hyper.config import HyperConfig
    from hf_hyper.errors import ConfigError
    from hf_hyper.pipeline.smollm2 import HUB_ID, fetch_smollm2

    try:
        config = HyperConfig(bits=arguments.bits, effort="fast")
    except ConfigError as error:
        raise UsageError(str(error)) from error
    source = fetch_smollm2()
    print(f"model            {HUB_ID}")
    with tempfile.TemporaryDirectory(prefix="hf-hyper-demo-") as scratch:
        _compare(source, Path(arguments.keep or Path(scratch, "model")), config)
    if arguments.keep is not None:
        print(f"\nkept in {arguments.keep}")


def _compare(source: str | Path, folder: Path, config: HyperConfig) -> None:
    import torch

    from hf_hyper.cli.models import load
    from hf_hyper.eval import evaluate_model, load_text, windows
    from hf_hyper.pipeline.compress import compress

    started = time.perf_counter()
    report = compress(source, folder, config)
    print(
        f"compression      {time.perf_counter() - started:.0f} s at effort {config.effort}, loading and saving included"
    )
    print(f"bits per weight  {report.bits_per_weight:.3f} in {len(report.tensors)} compressed tensors, all overheads")
    print(f"size             {report.bytes_16bit / 1e6:.1f} MB in 16 bits, {report.size_bytes / 1e6:.1f} MB compressed")
    original, tokenizer = load(source, dtype=torch.float32)
    compressed, _ = load(folder, dtype=torch.float32)
    ids = windows(tokenizer, load_text(), _SEQ_LEN, _SEQUENCES)
    result = evaluate_model(compressed, ids, original)
    print(f"perplexity       {result.ref_ppl:.2f} original, {result.ppl:.2f} compressed ({result.tokens} tokens)")
    print(f"KL divergence    {result.kl_mean:.4f} nats a token; same top token for {result.top1:.1%}")
    for title, model in (("original", original), ("compressed", compressed)):
        print(f"\n{title}:\n  {_PROMPT}{_continuation(model, tokenizer)}")


def _continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model writes after the prompt, the likeliest token every time."""
    from transformers import GenerationConfig

    inputs = tokenizer(_PROMPT, return_tensors="pt")
    plain = GenerationConfig(max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    output = model.generate(**inputs, generation_config=plain)  # pyright: ignore[reportCallIssue]
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(str(text).splitlines())
