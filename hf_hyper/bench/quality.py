"""Compression methods on one model, in one run, on equal terms.

Every method gets the same weights (all linear layers of the decoder, not the output head) and gives back weights of the
same shape, decoded; these stand in the float32 reference model, and the same windows of text measure each. Kernels
therefore play no part. Bits per weight count everything a method stores for those weights: codes, scales, offsets and
padding. Only `fisher`, `ldlq` and `plain` see calibration text, which must not be the text that measures.

    python -m hf_hyper.bench.quality --model DIR --text FILE [FILE ...] --json OUT [--plot PNG] [--bits 4 3]
        [--sequences 16] [--seq-len 512] [--calibration TEXT] [--effort balanced]

Use a model whose weights sit on no grid (`hf_hyper.bench.offgrid`): the grid of an earlier quantization flatters
methods that resemble it.

| method | what it is | bits per weight |
|---|---|---|
| `shift`, `winding` | `HyperConfig(bits=b, hyperfunction=...)` through `from_pretrained` | measured |
| `fisher`, `ldlq`, `plain` | `shift`, calibrated, with that `rounding`; `plain`: LDLQ as published | measured |
| `nf4`, `nf4-dq` | bitsandbytes, blocks of 64, scales in float32 or quantized again (`dq`) | 4.5, 4.13 |
| `hqq` | HQQ (package `hqq`), groups of 64, asymmetric, float16 scales and zero points | b + 32 / 64 |
| `rtn` | rounding to nearest, asymmetric, groups of 64 inputs, 16-bit scale and b-bit zero point | b + (16 + b) / 64 |
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_hyper import HyperConfig
from hf_hyper.bench.harness import environment
from hf_hyper.errors import ConfigError, HyperError
from hf_hyper.eval import evaluate_model, load_text, windows
from hf_hyper.nn import HyperLinear
from hf_hyper.pipeline.report import write_json

__all__ = ["compare", "decoder_linears", "main", "round_to_nearest"]

GROUP_SIZE = 64
"""Weights that share a scale in `nf4` and `rtn`; the common choice of both."""

_CALIBRATED = ("fisher", "ldlq", "plain")
_OURS = ("shift", "winding", *_CALIBRATED)
_METHODS = (*_OURS, "nf4", "nf4-dq", "hqq", "rtn")
_PACKAGES = ("hf-hyper", "transformers", "bitsandbytes", "hqq")
_NEEDED = {"nf4": "bitsandbytes", "nf4-dq": "bitsandbytes", "hqq": "hqq"}

Row = dict[str, Any]


def decoder_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Linear layers of a model by name, without the output head.

    Raises:
        ConfigError: There are none.
    """
    head = model.get_output_embeddings()
    found = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    if not found:
        raise ConfigError(f"{type(model).__name__} has no linear layers to compress; give a decoder made of nn.Linear")
    return found


def round_to_nearest(weight: Tensor, bits: int, group_size: int = GROUP_SIZE) -> tuple[Tensor, int]:
    """Quantize groups of inputs to an asymmetric uniform grid that contains zero, and decode.

    A group is `group_size` weights of one row that follow one another; the last may be shorter. Its scale is rounded to
    float16 before use, its zero point is an integer of `bits` bits.

    Args:
        weight: `[out_features, in_features]` floating point.
        bits: Bits a code, 1 to 8.
        group_size: Weights that share a scale and a zero point.

    Returns:
        The decoded weight, shape and dtype of `weight`, and the number of bits stored for it.
    """
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    # Zeros change no range here, as every range contains zero.
    grouped = nn.functional.pad(weight.float(), (0, groups * group_size - columns)).view(rows, groups, group_size)
    top = 2**bits - 1
    low, high = grouped.amin(dim=-1, keepdim=True).clamp(max=0), grouped.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).half().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round(-low / scale).clamp(0, top)
    codes = (torch.round(grouped / scale) + zero).clamp(0, top)
    decoded = ((codes - zero) * scale).view(rows, -1)[:, :columns]
    return decoded.to(weight.dtype), weight.numel() * bits + rows * groups * (16 + bits)


def compare(
    model_path: str | Path,
    texts: Mapping[str, str],
    bits: Sequence[int] = (4, 3),
    methods: Sequence[str] = ("shift", "nf4", "nf4-dq", "rtn"),
    sequences: int | None = 16,
    seq_len: int = 512,
    device: str = "cpu",
    effort: str = "balanced",
    calibration: str = "default",
    calibration_tokens: int = 32768,
) -> Iterator[Row]:
    """Measure each method on one model; a row for every text is given as soon as it is there.

    Args:
        model_path: Folder or Hub id of an uncompressed causal language model.
        texts: The evaluation texts by name.
        bits: Code bits of the methods that have a choice.
        methods: Names from the table above.
        sequences: Windows of text; None takes all.
        seq_len: Tokens a window.
        effort: Of our own methods.
        calibration: Text of the methods that see one.
        calibration_tokens: How much of it.
        device: Device on which peers quantize and every model runs.

    Yields:
        A row with `method`, `bits`, `bits_per_weight`, the fields of `EvalResult`, `weights` (their number), `seconds`
        (to compress and decode), `text` (its name), `text_sha256`, `model`, `device`, `versions` and `commit`; or, for
        a peer that is not installed, a row with `method`, `bits` and `skipped`, the reason.

    Raises:
        ConfigError: A method is unknown, or model, text and windows do not go together.
    """
    unknown = sorted(set(methods) - set(_METHODS))
    if unknown:
        raise ConfigError(f"method {unknown[0]!r} is unknown; choose from {', '.join(_METHODS)}")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    cuts = {name: windows(tokenizer, text, seq_len, sequences) for name, text in texts.items()}
    reference = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, device_map=device)
    originals = decoder_linears(reference)
    candidate = copy.deepcopy(reference)
    common = {
        "weights": sum(linear.weight.numel() for linear in originals.values()),
        "model": Path(model_path).name,
        **environment(*_PACKAGES, device=device),
    }
    for method, width in _plan(methods, bits):
        needed = _NEEDED.get(method)
        if needed is not None and importlib.util.find_spec(needed) is None:
            yield {"method": method, "bits": width, "skipped": f"{needed} is not installed"}
            continue
        start = time.perf_counter()
        options: dict[str, Any] = {"effort": effort, "hyperfunction": "winding" if method == "winding" else "shift"}
        if method in _CALIBRATED:
            options |= {"rounding": method, "calibration": calibration, "calibration_tokens": calibration_tokens}
        if method in _OURS:
            decoded = _ours(model_path, HyperConfig(bits=width, **options), originals)
        else:
            decoded, options = _peer(method, width, originals), {}
        stored = 0
        with torch.no_grad():
            for name, weight, count in decoded:
                candidate.get_submodule(name).weight.copy_(weight)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                stored += count
        seconds = time.perf_counter() - start
        for name, text in texts.items():
            yield {
                "method": method,
                "bits": width,
                "bits_per_weight": stored / common["weights"],
                **evaluate_model(candidate, cuts[name], reference).to_dict(),
                "seconds": seconds,
                **{key: Path(value).name if key == "calibration" else value for key, value in options.items()},
                "text": name,
                "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
                **common,
            }


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a table; `ours/peer` is the mean KL of our first method at the same code bits over the row's."""
    ours = {(row["bits"], row["text"]): row for row in reversed(rows) if row["method"] in _OURS}
    lines = [
        f"{'method':<10}{'bits':>5}{'bits/weight':>13}{'KL mean':>10}{'KL 99 %':>10}{'KL max':>9}{'top-1':>8}"
        f"{'ppl':>9}{'ref ppl':>9}{'ours/peer':>11}{'seconds':>9}  text"
    ]
    for row in rows:
        if "skipped" in row:
            lines.append(f"{row['method']:<10}{row['bits']:>5}  skipped: {row['skipped']}")
            continue
        rival = ours.get((row["bits"], row["text"]))
        ratio = (
            "" if rival is None or rival is row or not row["kl_mean"] else f"{rival['kl_mean'] / row['kl_mean']:.3f}"
        )
        lines.append(
            f"{row['method']:<10}{row['bits']:>5}{row['bits_per_weight']:>13.3f}{row['kl_mean']:>10.4f}"
            f"{row['kl_p99']:>10.3f}{row['kl_max']:>9.3f}{row['top1']:>8.3f}{row['ppl']:>9.3f}{row['ref_ppl']:>9.3f}"
            f"{ratio:>11}{row['seconds']:>9.1f}  {row['text']}"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw KL divergence against bits per weight on the first text, a line for every method, as a PNG."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if "skipped" not in row]
    measured = [row for row in measured if row["text"] == measured[0]["text"]]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in measured):
        points = sorted((row["bits_per_weight"], row["kl_mean"]) for row in measured if row["method"] == method)
        width = 2.4 if method in _OURS else 1.2
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=method)
    axes.set(
        yscale="log",
        xlabel="bits per weight, everything counted",
        ylabel="KL divergence from the original, nats a token",
        title=f"{measured[0]['model']}, {measured[0]['text']}",
    )
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


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
    parser.add_argument("--plot", type=Path, help="file for a picture of KL against bits, .png")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3], help="code bits (default: 4 3)")
    parser.add_argument("--methods", nargs="+", choices=_METHODS, default=["shift", "nf4", "nf4-dq", "rtn"])
    parser.add_argument("--sequences", type=int, default=16, help="windows of text (default: 16)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--effort", default="balanced", help="of our own methods (default: balanced)")
    parser.add_argument("--calibration", default="default", help="text of the methods that see one (default: default)")
    parser.add_argument("--calibration-tokens", type=int, default=32768, help="how much of it (default: 32768)")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    try:
        texts = {Path(source).name: load_text(source) for source in options.text}
        for row in compare(
            options.model,
            texts,
            options.bits,
            options.methods,
            options.sequences,
            options.seq_len,
            options.device,
            options.effort,
            options.calibration,
            options.calibration_tokens,
        ):
            rows.append(row)
            if options.json:
                write_json(options.json, rows)
        if options.plot:
            draw(rows, options.plot)
    except (HyperError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(rows))
    return 0


def _plan(methods: Sequence[str], bits: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Method and code bits of every run; nf4 exists at 4 bits only and is run whatever bits are asked for."""
    for method in methods:
        for width in (4,) if method.startswith("nf4") else bits:
            yield method, width


def _ours(
    model_path: str | Path, config: HyperConfig, originals: Mapping[str, nn.Linear]
) -> Iterator[tuple[str, Tensor, int]]:
    """Name, decoded weight and stored bits of every linear layer, from a model compressed while it is loaded."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, quantization_config=config)
    for name in originals:
        layer = model.get_submodule(name)
        if not isinstance(layer, HyperLinear):
            raise HyperError(
                f"{name} is a {type(layer).__name__} after compression and the peers compress it; methods would not "
                "be on equal terms: choose a model whose decoder is compressed whole"
            )
        stored = sum(tensor.numel() * tensor.element_size() * 8 for tensor in layer.stored())
        yield name, layer.dequantize(torch.float32), stored


def _peer(method: str, bits: int, originals: Mapping[str, nn.Linear]) -> Iterator[tuple[str, Tensor, int]]:
    """Name, decoded weight and stored bits of every linear layer under another method."""
    quantize: Callable[[Tensor], tuple[Tensor, int]]
    if method == "rtn":
        quantize = lambda weight: round_to_nearest(weight, bits)  # noqa: E731
    elif method == "hqq":
        quantize = lambda weight: _hqq(weight, bits)  # noqa: E731
    else:
        quantize = lambda weight: _nf4(weight, nested=method == "nf4-dq")  # noqa: E731
    for name, linear in originals.items():
        yield name, *quantize(linear.weight.detach())


def _nf4(weight: Tensor, nested: bool) -> tuple[Tensor, int]:
    """Decoded weight and stored bits under bitsandbytes' 4-bit NormalFloat; its 16-entry table is not counted."""
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=GROUP_SIZE, compress_statistics=nested, quant_type="nf4"
    )
    tensors = [packed, state.absmax]
    if state.state2 is not None:
        tensors += [state.state2.absmax, state.offset]
    stored = sum(tensor.numel() * tensor.element_size() * 8 for tensor in tensors)
    return functional.dequantize_4bit(packed, state), stored


def _hqq(weight: Tensor, bits: int) -> tuple[Tensor, int]:
    """Decoded weight and stored bits under half-quadratic quantization; the packing of odd widths is not counted."""
    from hqq.core.quantize import Quantizer  # pyright: ignore[reportMissingImports]

    packed, meta = Quantizer.quantize(
        weight,
        nbits=bits,
        channel_wise=True,
        group_size=GROUP_SIZE,
        optimize=True,
        device=str(weight.device),
        compute_dtype=torch.float16,
    )
    scales = meta["scale"].numel() + meta["zero"].numel()
    return Quantizer.dequantize(packed, meta).to(weight.dtype), weight.numel() * bits + 16 * scales


if __name__ == "__main__":
    raise SystemExit(main())
