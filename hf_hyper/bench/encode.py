"""Encoders: weights per second against error, by rate and effort, and against a KD-tree and HQQ.

    python -m hf_hyper.bench.encode [--json OUT] [--bits 2 3 4 6 8] [--shape 512x1024] [--turns 3] [--threads N]
    python -m hf_hyper.bench.encode --device cuda --shape 4096x4096 [--json OUT] [--bits 4]

One Gaussian matrix is compressed whole, rotations and scales included, by every contender in turns. Error is the mean
squared error over the variance of the weights; bits per weight count everything that is stored.

| contender | what it is |
|---|---|
| `shift EFFORT` | `codec.quantize`, the default of this package |
| `winding EFFORT` | the paper's method with its 1600 points and 3 shells, 6.5 bits a weight |
| `winding KD-tree` | the same points found with scikit-learn's KD-tree, as the released code does; the search alone |
| `HQQ` | hqq's own quantizer, groups of 64 along the inputs; at 2, 3, 4 and 8 bits, where hqq is installed |

GPUs run `shift best` alone, which is what they search at any effort, and HQQ.
Speed by processor time stands beside that by wall time, because a busy machine disturbs it less.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_hyper import _native, codec, hyperfunctions
from hf_hyper.bench.harness import PAPER, environment, ratios, stopwatch
from hf_hyper.config import HyperConfig
from hf_hyper.encoders import EFFORTS
from hf_hyper.hyperfunctions.winding import nodes
from hf_hyper.pipeline.report import write_json
from hf_hyper.scheme import TensorScheme

__all__ = ["contenders", "main"]

GROUP = 64
HQQ_BITS = (2, 3, 4, 8)

Row = dict[str, Any]
Contender = tuple[float, float, Callable[[], Callable[[], Tensor]]]
"""Nominal bits, stored bits per weight, and the encoder, which returns a function that decodes."""


def contenders(weight: Tensor, rates: Sequence[int]) -> dict[str, Contender]:
    """Every encoder that is installed, by name."""
    rows, columns = weight.shape
    found: dict[str, Contender] = {}
    for bits in rates:
        scheme = HyperConfig(bits=bits).scheme(rows, columns)
        for effort in EFFORTS[-1:] if weight.is_cuda else EFFORTS:
            encoder = functools.partial(_ours, weight, scheme, effort)
            found[f"shift {effort} {bits}"] = (bits, codec.bits_per_weight(scheme), encoder)
    bits, constants = hyperfunctions.get("winding").resolve(6.5, PAPER)
    scheme = TensorScheme("winding", bits, rows, columns, incoherence=False, options=constants)
    for effort in () if weight.is_cuda else EFFORTS[:2]:  # `best` is `balanced`
        found[f"winding {effort}"] = (
            bits,
            codec.bits_per_weight(scheme),
            functools.partial(_ours, weight, scheme, effort),
        )
    if importlib.util.find_spec("sklearn") and not weight.is_cuda:
        encoder = functools.partial(_kd_tree, weight, scheme)
        found["winding KD-tree"] = (bits, codec.bits_per_weight(scheme), encoder)
    if importlib.util.find_spec("hqq"):
        for bits in sorted(set(rates) & set(HQQ_BITS)):
            found[f"HQQ {bits}"] = (bits, bits + 32 / GROUP, functools.partial(_hqq, weight, bits))
    return found


def _ours(weight: Tensor, scheme: TensorScheme, effort: str) -> Callable[[], Tensor]:
    tensors = codec.quantize(weight, scheme, effort)
    return lambda: codec.dequantize(tensors, scheme)


def _kd_tree(weight: Tensor, scheme: TensorScheme) -> Callable[[], Tensor]:
    neighbors = importlib.import_module("sklearn.neighbors")
    unit = nodes(scheme, weight.device).double().numpy()
    points = (weight.view(-1, 2) / (4 * weight.std())).clamp(-0.5, 0.5)  # boxes of 4 deviations, as wide as ours
    index = neighbors.KDTree(unit, leaf_size=100).query(points.double().numpy(), k=1)[1][:, 0]
    assert len(index) == len(points)
    return lambda: codec.dequantize(codec.quantize(weight, scheme, "fast"), scheme)  # the same nodes


def _hqq(weight: Tensor, bits: int) -> Callable[[], Tensor]:
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    codes, meta = quantizer.quantize(
        weight, nbits=bits, group_size=GROUP, axis=1, device=str(weight.device), compute_dtype=torch.float32
    )
    return lambda: quantizer.dequantize(codes, meta)


def _measure(weight: Tensor, found: dict[str, Contender], turns: int) -> list[Row]:
    variance = float(weight.double().square().mean())
    seconds: dict[str, list[float]] = {name: [] for name in found}
    processor: dict[str, list[float]] = {name: [] for name in found}
    errors: dict[str, float] = {}
    for name, (_, _, encode) in found.items():
        decoded = encode()()
        errors[name] = float((decoded.double() - weight.double()).square().mean()) / variance
    for _ in range(turns):
        for name, (_, _, encode) in found.items():
            stop, own = stopwatch(str(weight.device)), time.process_time()
            encode()
            seconds[name].append(stop())
            processor[name].append(time.process_time() - own)
    baselines = [name for name in found if name == "winding KD-tree" or name.startswith("HQQ")]
    rows: list[Row] = []
    for name, (bits, stored, _) in found.items():
        row = {
            "op": "encode",
            "shape": list(weight.shape),
            "M": None,
            "bits": bits,
            "bits_per_weight": stored,
            "kernel": name,
            "relative_mse": errors[name],
            "bound": 4.0**-bits,
            "seconds_median": statistics.median(seconds[name]),
            "weights_per_second": weight.numel() / statistics.median(seconds[name]),
            "weights_per_second_by_processor_time": torch.get_num_threads()
            * weight.numel()
            / statistics.median(processor[name]),
            "bandwidth_share": None,
            "threads": torch.get_num_threads(),
        }
        rivals = [other for other in baselines if other != name and (found[other][0] == bits or "KD" in other)]
        rows += [{**row, "baseline": other, **ratios(seconds[other], seconds[name])} for other in rivals] or [
            {**row, "baseline": None, "ratio_median": None}
        ]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m hf_hyper.bench.encode", description="Speed and error of encoders.")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 6, 8], help="bits per weight of shift and HQQ")
    parser.add_argument("--shape", default="512x1024", help="rows x columns")
    parser.add_argument("--turns", type=int, default=3, help="interleaved turns")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and the core")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    rows, columns = (int(side) for side in given.shape.split("x"))
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02).to(given.device)
    common = {**environment("scikit-learn", "hqq", device=given.device), "core": _native.load() is not None}
    if not importlib.util.find_spec("hqq"):
        print("HQQ is left out: hqq is not installed", file=sys.stderr)
    measured = [{**row, **common} for row in _measure(weight, contenders(weight, given.bits), given.turns)]
    for row in measured:
        against = f"{row['baseline']} x{row['ratio_median']:.2f}" if row["baseline"] else ""
        print(
            f"{row['kernel']:<20} {row['bits_per_weight']:5.2f} bits/weight  error {row['relative_mse']:.3e}  "
            f"{row['weights_per_second'] / 1e6:7.3f} M weights/s "
            f"({row['weights_per_second_by_processor_time'] / 1e6:7.3f} by processor time)  {against}",
            flush=True,
        )
    if given.json:
        write_json(given.json, measured)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
