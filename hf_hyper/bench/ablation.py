"""From the setting of arXiv 2409.00592 to `shift`, one step at a time, on a trained language model.

    python -m hf_hyper.bench.ablation --model DIR [--text FILE] [--json OUT] [--sequences 8] [--seq-len 512]
        [--steps STEP ...] [--calibration TEXT]

Every row compresses all linear layers of the decoder, decodes them into the float32 model and measures its perplexity.
Steps build on each other as far as `shift`:

| step | what changes |
|---|---|
| `paper` | U = 1600, M = 3, integer slope, box of side 0.1, shells and search of the released code: 6.5 bits |
| `box` | side of the box chosen per tensor |
| `search` | nearest of all codes, shells that grow geometrically |
| `direction` | half-integer slope, nearly hexagonal; as many points as 13 bits hold |
| `scales` | a 16-bit scale for 64 weights |
| `incoherence` | rotations, in the place of scales |
| `4 bits` | the same at 4 bits |
| `shift` | the default of this package at 4 bits; `shift 6`, at nearly the rate of the paper |
| `calibrated` | `shift` at 4 bits, calibrated; `calibrated 4.3`: at two thirds of 6.5 bits, all overheads counted |

The paper's codes take 13 bits a pair, and the centre and shells of every tensor come on top. As far as `direction` a
few of the smallest layers pay for that: they have as many points as 12 bits hold, so that all that is stored is at
most 6.5 bits a weight. `layers_below` counts them.

With `--json` an existing file keeps its rows of other steps, so single steps can be measured again.

The table of directions gives `dispersion_bound` for U = 1600 in units of U^(-1/K).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_hyper import codec, compress_model
from hf_hyper.bench.harness import PAPER, environment
from hf_hyper.bench.quality_methods import decoder_linears
from hf_hyper.config import HyperConfig
from hf_hyper.eval import evaluate_model, load_text, windows
from hf_hyper.hyperfunctions.directions import direction, dispersion_bound
from hf_hyper.hyperfunctions.winding import DIRECTIONS, WindingOptions, code_width
from hf_hyper.pipeline.allocate import rates_between
from hf_hyper.pipeline.report import summarize, write_json
from hf_hyper.scheme import TensorScheme

__all__ = ["STEPS", "ablate", "directions", "main", "schemes_within"]

Row = dict[str, Any]


STEPS: dict[str, dict[str, Any]] = {
    "paper": {"bits": 6.5, "effort": "fast", "winding": {**PAPER, "box_side": 0.1}},
    "box": {"bits": 6.5, "effort": "fast", "winding": PAPER},
    "search": {"bits": 6.5, "winding": PAPER},
    "direction": {"bits": 6.5, "winding": {}},
    "scales": {"bits": 6.5, "winding": {"group_size": 64}},
    "incoherence": {"bits": 6.5, "winding": {"incoherence": True}},
    "4 bits": {"bits": 4, "winding": {"incoherence": True}},
    "shift": {"bits": 4},
    "shift 6": {"bits": 6},
    "calibrated": {"bits": 4, "calibration": "default"},
    "calibrated 4.3": {"bits": 4.28, "calibration": "default"},
}


def ablate(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    steps: Sequence[str] = tuple(STEPS),
    calibration: str = "default",
) -> Iterator[Row]:
    """Error, rate, perplexity and time of every step; the first row is the model itself.

    Args:
        model: Uncompressed causal language model, float32; calibrated steps read the tokenizer beside its files.
        tokens: Windows of text as `hf_hyper.eval.windows` cuts them.
        steps: Names from `STEPS`.
        calibration: Text of the calibrated steps; not the one that `tokens` come from.
    """
    originals = decoder_linears(model)
    weights = sum(linear.weight.numel() for linear in originals.values())
    reference = evaluate_model(model, tokens).ppl
    yield {"op": "ablation", "step": "original", "bits_per_weight": 32.0, "ppl": reference, "weights": weights}
    for step in steps:
        options = dict(STEPS[step])
        if "calibration" in options:
            options["calibration"] = calibration
        config = HyperConfig(hyperfunction="winding" if "winding" in options else "shift", **options)
        start, below = time.perf_counter(), 0
        if config.calibration is None:
            schemes = schemes_within(config, {name: tuple(layer.weight.shape) for name, layer in originals.items()})
            stored = sum(codec.bits_per_weight(scheme) * scheme.num_weights for scheme in schemes.values())
            below = sum(scheme.bits < config.bits for scheme in schemes.values())
            candidate = _rounded(model, originals, schemes, config.effort)
        else:
            compressed = compress_model(copy.deepcopy(model), config)
            stored = summarize(compressed).compressed_bytes * 8
            candidate = compressed.dequantize()
        seconds = time.perf_counter() - start
        pairs = [
            (candidate.get_submodule(name).get_parameter("weight"), linear.weight) for name, linear in originals.items()
        ]
        with torch.no_grad():
            error = sum(float((after - before).double().square().sum()) for after, before in pairs)
            norm = sum(float(before.double().square().sum()) for _, before in pairs)
        ppl = evaluate_model(candidate, tokens).ppl
        yield {
            "op": "ablation",
            "step": step,
            "hyperfunction": config.hyperfunction,
            "options": options | ({"calibration": Path(calibration).name} if "calibration" in options else {}),
            "bits_per_weight": stored / weights,
            "layers_below": below,
            "relative_mse": error / norm,
            "ppl": ppl,
            "ppl_increase": ppl / reference - 1,
            "seconds": seconds,
            "weights": weights,
        }


def schemes_within(config: HyperConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorScheme]:
    """Scheme of every layer of a step without calibration.

    With `winding`, and neither scales nor rotations, the smallest layers have codes one bit shorter, and as many points
    as these hold, until everything stored is at most `config.bits` a weight. Of equal layers those in the middle of the
    network pay first, where the same relative error costs least.

    Args:
        config: The step.
        shapes: Rows and columns of every weight by name, in the order of the network.
    """
    names, sizes = list(shapes), {name: math.prod(shape) for name, shape in shapes.items()}
    rates = rates_between(config, sizes)
    schemes = {name: config.scheme(*shapes[name], bits=rates.get(name)) for name in names}
    options = config.winding
    if config.hyperfunction != "winding" or not isinstance(options, WindingOptions):
        return schemes
    if options.group_size is not None or options.incoherence:
        return schemes
    shorter = HyperConfig(**{**config.to_dict(), "winding": dataclasses.replace(options, num_points=None)})
    stored = {name: codec.bits_per_weight(schemes[name]) * sizes[name] for name in names}
    for place in sorted(range(len(names)), key=lambda i: (sizes[names[i]], abs(2 * i - len(names) + 1), i)):
        if sum(stored.values()) <= config.bits * sum(sizes.values()):
            break
        name = names[place]
        width = code_width(schemes[name]) - 1
        schemes[name] = shorter.scheme(*shapes[name], bits=width / options.dimension)
        stored[name] = codec.bits_per_weight(schemes[name]) * sizes[name]
    return schemes


def _rounded(
    model: PreTrainedModel, originals: Mapping[str, nn.Linear], schemes: Mapping[str, TensorScheme], effort: str
) -> PreTrainedModel:
    """The model with every linear layer stored and decoded."""
    candidate = copy.deepcopy(model)
    for name, linear in originals.items():
        tensors = codec.quantize(linear.weight.detach(), schemes[name], effort)
        with torch.no_grad():
            weight = candidate.get_submodule(name).get_parameter("weight")
            weight.copy_(codec.dequantize(tensors, schemes[name]))
    return candidate


def directions(num_points: int = 1600) -> Iterator[Row]:
    """Bound on the largest hole by direction and dimension, in units of U^(-1/K)."""
    for dimension in (1, 2, 3, 4):
        for name in DIRECTIONS:
            bound = dispersion_bound(direction(name, num_points, dimension), num_points)
            yield {
                "op": "dispersion",
                "direction": name,
                "dimension": dimension,
                "num_points": num_points,
                "bound": bound,
                "bound_over_root": bound * num_points ** (1 / dimension),
            }


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m hf_hyper.bench.ablation", description="From the paper to shift.")
    parser.add_argument("--model", required=True, help="folder or Hub id of an uncompressed causal language model")
    parser.add_argument("--text", help="text file, data set, or 'bundled' (the default)")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--calibration", default="default", help="text of calibrated steps, not that of --text")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--sequences", type=int, default=8, help="windows of text")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window")
    given = parser.parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokens = windows(tokenizer, load_text(given.text), given.seq_len, given.sequences)
    kept = json.loads(given.json.read_text()) if given.json and given.json.is_file() else []
    kept = {row["step"]: row for row in kept if row["op"] == "ablation"}
    dispersion = [{**row, **environment()} for row in directions()]
    about = {"model": Path(given.model).name, "sequences": len(tokens), "seq_len": given.seq_len}
    for row in ablate(model, tokens, given.steps, given.calibration):
        kept[row["step"]] = {**row, **about, **environment("transformers")}
        print(json.dumps(row), flush=True)
        if given.json:
            write_json(given.json, dispersion + [kept[step] for step in ("original", *STEPS) if step in kept])
    return 0


if __name__ == "__main__":
    sys.exit(main())
