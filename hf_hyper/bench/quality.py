"""Compression methods on one model, in one run, on equal terms.

Every method gets the same weights (all linear layers of the decoder, not the output head) and gives back weights of the
same shape, decoded; these stand in the float32 reference model, and the same windows of text measure each. Kernels
therefore play no part. Bits per weight count everything a method stores for those weights: codes, scales, offsets and
padding. Methods that are calibrated all see the same windows of one text, which must not be the text that measures.

    python -m hf_hyper.bench.quality --model DIR --text FILE [FILE ...] --json OUT [--plot PNG] [--bits 4 3.5 3]
        [--methods fit gptq ...] [--resume] [--sequences 16] [--seq-len 512] [--calibration TEXT] [--effort balanced]
        [--seed 0]

Use a model whose weights sit on no grid (`hf_hyper.bench.offgrid`): the grid of an earlier quantization flatters
methods that resemble it.

Methods are ours (`hf_hyper.bench.quality_methods`) and others' (`hf_hyper.bench.peers`). With `--resume` the rows that
the JSON file has answer their question, but for the methods named by `--anew`, and others are added: methods can run
one by one, each in the environment that has its package.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_hyper import HyperConfig
from hf_hyper.bench.harness import environment
from hf_hyper.bench.peers import PEERS, Decoded, Task
from hf_hyper.bench.quality_methods import CALIBRATED, METHODS, OURS, decoder_linears, ours, plan
from hf_hyper.bench.quality_report import draw, format_table
from hf_hyper.config import WITH_GRADIENTS
from hf_hyper.errors import HyperError
from hf_hyper.eval import evaluate_model, load_text, windows
from hf_hyper.pipeline.calibration_text import calibration_windows
from hf_hyper.pipeline.report import write_json

__all__ = ["compare", "main", "run"]

_QUESTION = (
    *("method", "bits", "recipe", "effort", "seed", "allocation", "group_size", "iters", "calibration_sha256"),
    *("model_sha256", "text_sha256", "tokens", "seq_len"),
)
"""Fields that say what a row measured; two rows that share them answer the same question."""

Row = dict[str, Any]


def compare(
    model_path: str | Path,
    texts: Mapping[str, str],
    bits: Sequence[float] = (4, 3),
    methods: Sequence[str] = ("shift", "nf4", "nf4-dq", "rtn"),
    sequences: int | None = 16,
    seq_len: int = 512,
    device: str = "cpu",
    effort: str = "balanced",
    calibration: str | Sequence[str] = "default",
    calibration_name: str | None = None,
    calibration_tokens: int = 32768,
    recipes: Sequence[str] | None = None,
    seed: int = 0,
    known: Sequence[Row] = (),
) -> Iterator[Row]:
    """Measure each method on one model; a row for every text is given as soon as it is there.

    Args:
        model_path: Folder or Hub id of an uncompressed causal language model.
        texts: The evaluation texts by name.
        bits: Rates; peers take the whole ones among them that they have.
        methods: Names from `quality_methods.METHODS`.
        sequences: Windows of text; None takes all.
        seq_len: Tokens a window.
        device: Device on which peers quantize and every model runs.
        effort: Of our own methods.
        calibration: Text of the methods that see one, as in `HyperConfig`.
        calibration_name: What rows call it; None for its own name.
        calibration_tokens: How much of it.
        recipes: Of `gguf`; None for all.
        seed: Of our own methods; rows tell it where it is not 0.
        known: Rows of earlier runs; what they answer is not measured again, and no row is given for it.

    Yields:
        A row with `method`, `bits` (for `gguf` the digit in the name of its `recipe`), `bits_per_weight`, the fields of
        `EvalResult`, `weights` (their number), `seconds` (to compress and decode), `text` (its name), the options of
        the method, sha256 of text, model and calibration windows, `model`, `device`, `versions` and `commit`; or, for
        a peer that is not installed, a row with `method`, `bits` and `skipped`, the reason.

    Raises:
        ConfigError: A method is unknown, or model, text and windows do not go together.
    """
    runs = list(plan(methods, bits, recipes))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    cuts = {name: windows(tokenizer, text, seq_len, sequences) for name, text in texts.items()}
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, device_map=device)
    originals = decoder_linears(reference)
    candidate = copy.deepcopy(reference)
    shown = torch.zeros(1, 1, dtype=torch.int64)
    if any(method in CALIBRATED or (method in PEERS and PEERS[method].calibrated) for method in methods):
        shown = calibration_windows(reference, calibration, calibration_tokens, seed=0)
    task = Task(model_path, reference, originals, shown)
    read = {
        "calibration": calibration_name or Path(str(calibration)).name,
        "calibration_tokens": shown.numel(),
        "calibration_sha256": hashlib.sha256(shown.numpy().tobytes()).hexdigest(),
    }
    packages = [package for method in methods if method in PEERS for package in PEERS[method].packages]
    common = {
        "weights": sum(linear.weight.numel() for linear in originals.values()),
        "model": Path(model_path).name,
        "model_sha256": _fingerprint(originals),
        **environment("hf-hyper", "transformers", *packages, device=device),
    }
    answered = {_question(row) for row in known}
    remembered = cast(PreTrainedModel, _Remembered(reference))
    for method, variant in runs:
        about: Row = {"method": method, **variant}
        peer = PEERS.get(method)
        if peer is not None and peer.module is not None and importlib.util.find_spec(peer.module) is None:
            yield {**about, "skipped": f"{peer.module} is not installed"}
            continue
        if method in OURS:
            about |= {"effort": effort, **({"rounding": method} if method in CALIBRATED else {})}
            about |= {"allocation": "loss"} if method in WITH_GRADIENTS else {}
            about |= {"seed": seed} if seed else {}
        about |= {} if peer is None or peer.options is None else peer.options
        about |= read if method in CALIBRATED or (peer is not None and peer.calibrated) else {}
        asked = {
            name: {
                **about,
                "text": name,
                "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
                "tokens": cuts[name][:, 1:].numel(),
                "seq_len": seq_len,
                **common,
            }
            for name, text in texts.items()
        }
        asked = {name: row for name, row in asked.items() if _question(row) not in answered}
        if not asked:
            continue
        start = time.perf_counter()
        if peer is None:
            options: dict[str, Any] = {"hyperfunction": "winding" if method == "winding" else "shift"}
            if method in CALIBRATED:
                options |= {"rounding": method, "calibration": calibration, "calibration_tokens": calibration_tokens}
            decoded = ours(task, method, HyperConfig(bits=variant["bits"], effort=effort, seed=seed, **options))
        else:
            decoded = peer.quantize(task, str(variant.get("recipe", variant["bits"])))
        stored = _fill(candidate, decoded)
        seconds = time.perf_counter() - start
        for name, row in asked.items():
            yield {
                **row,
                "bits_per_weight": stored / common["weights"],
                **evaluate_model(candidate, cuts[name], remembered).to_dict(),
                "seconds": seconds,
            }


def run(measure: Callable[..., Iterator[Row]], file: Path | None, resume: bool, anew: Sequence[str] = ()) -> list[Row]:
    """All rows of a comparison, written to a file one after the other.

    Args:
        measure: Gives rows, those in its argument `known` left out.
        file: JSON; None for none.
        resume: Begin with the rows that the file has, instead of writing it anew.
        anew: Methods whose rows are dropped from it even so.
    """
    rows: list[Row] = []
    if resume and file is not None and file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in found if "skipped" not in row and row["method"] not in anew]
    for row in measure(known=tuple(rows)):
        rows.append(row)
        if file is not None:
            write_json(file, rows)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_hyper.bench.quality",
        description="Compare compression methods on one model by KL divergence from the original.",
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of the uncompressed model")
    parser.add_argument(
        "--text",
        nargs="+",
        default=["bundled"],
        help="text files (wiki.*.raw is read as WikiText rows), data sets, or 'bundled' (the default)",
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has, and measure the others")
    parser.add_argument("--anew", nargs="+", choices=METHODS, default=[], help="methods whose rows are not kept")
    parser.add_argument("--plot", type=Path, help="file for a picture of KL against bits, .png")
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3], help="rates; peers take whole ones (4 3)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["shift", "nf4", "nf4-dq", "rtn"])
    parser.add_argument("--recipes", nargs="+", help="of gguf (default: all that this bench knows)")
    parser.add_argument("--sequences", type=int, default=16, help="windows of text (default: 16)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--effort", default="balanced", help="of our own methods (default: balanced)")
    parser.add_argument("--seed", type=int, default=0, help="of our own methods (default: 0)")
    parser.add_argument("--calibration", default="default", help="text of the methods that see one (default: default)")
    parser.add_argument("--calibration-tokens", type=int, default=32768, help="how much of it (default: 32768)")
    options = parser.parse_args(arguments)
    try:
        texts = {Path(source).name: load_text(source) for source in options.text}
        rows = run(
            partial(
                compare,
                options.model,
                texts,
                options.bits,
                options.methods,
                options.sequences,
                options.seq_len,
                options.device,
                options.effort,
                options.calibration,
                calibration_tokens=options.calibration_tokens,
                recipes=options.recipes,
                seed=options.seed,
            ),
            options.json,
            options.resume,
            options.anew,
        )
        if options.plot:
            draw(rows, options.plot)
    except (HyperError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(rows))
    return 0


class _Remembered(nn.Module):
    """A model that runs once on every window and gives the same logits when asked again."""

    BYTES = 4 << 30
    """Of logits kept at most, beyond which windows are run again: 20000 tokens of a vocabulary of 50000."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.device = model, model.device
        self.kept: dict[bytes, Tensor] = {}

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        key = input_ids.cpu().numpy().tobytes()
        logits = self.kept.get(key)
        if logits is None:
            logits = self.model(input_ids=input_ids, use_cache=use_cache).logits
            if sum(kept.nbytes for kept in self.kept.values()) + logits.nbytes <= self.BYTES:
                self.kept[key] = logits.cpu()
        return SimpleNamespace(logits=logits)


def _question(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(field) for field in _QUESTION)


def _fingerprint(linears: Mapping[str, nn.Linear]) -> str:
    digest = hashlib.sha256()
    for name, linear in linears.items():
        digest.update(name.encode())
        digest.update(linear.weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _fill(candidate: PreTrainedModel, decoded: Iterator[Decoded]) -> int:
    """Put decoded weights into their layers; returns the bits stored for them.

    Peers quantize while they are asked for the next weight, with gradients where they need them.
    """
    stored = 0
    for name, weight, count in decoded:
        target: Tensor = candidate.get_parameter(f"{name}.weight")
        with torch.no_grad():
            target.copy_(weight)
        stored += count
    return stored


if __name__ == "__main__":
    raise SystemExit(main())
