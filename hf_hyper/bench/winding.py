"""`winding`: speed of the nearest search, and error by direction, box and effort.

    python -m hf_hyper.bench.winding [--json OUT] [--pairs 1000000] [--threads N] [--weights FILE.safetensors TENSOR]
        [--parts speed error]

Speed is that of finding the nearest of the paper's 1601 nodes for pairs of Gaussian weights: the compiled core against
the comparison with every node in torch, and against scikit-learn's KD-tree with the leaf size of the released code.
All three must give the same index (the tree the same distance, since it works in float64 and may break ties
otherwise); a row with another result is an error, not a number. Error is the mean squared error relative to the
variance of the weights, on Gaussian weights and, with `--weights`, on a trained matrix.

Needs `hf-hyper[bench]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_hyper import _native, hyperfunctions
from hf_hyper.bench.harness import environment, ratios
from hf_hyper.encoders import EFFORTS, encode
from hf_hyper.encoders.halving import nearest_brute_force
from hf_hyper.errors import HyperError
from hf_hyper.hyperfunctions.winding import DIRECTIONS, nodes
from hf_hyper.pipeline.report import write_json
from hf_hyper.scheme import TensorScheme

__all__ = ["errors", "main", "speeds"]

PAPER = {"num_points": 1600, "num_shells": 3}
"""U and M of the released code, 6.5 bits a weight."""

FIXED_SIDES = (2.0, 5.0)
"""Fixed box sides tried, in deviations of the weights: the released 0.1 on weights of deviation 0.05 and 0.02."""

_PARTS = {"speed": "winding_nearest", "error": "winding_error"}

Row = dict[str, Any]


def speeds(pairs: int, threads: int, repeats: int = 5) -> Iterator[Row]:
    """Pairs of Gaussian weights searched per second by every method, and its time over that of the compiled core.

    Raises:
        HyperError: Two methods disagree.
    """
    from sklearn.neighbors import KDTree

    unit = nodes(_scheme(2, 2, 4, {**PAPER, "direction": "lattice"}), torch.device("cpu"))
    points = (torch.randn(pairs, 2, generator=torch.Generator().manual_seed(0)) / 5).clamp(-0.5, 0.5)
    tree = KDTree(unit.double().numpy(), leaf_size=100)
    share = {"native": 1, "torch brute force": 20, "scikit-learn KDTree": 10}  # of the pairs: one in so many
    methods: dict[str, Callable[[Tensor], Any]] = {
        "native": lambda part: _native.winding_nearest(part, unit, threads),
        "torch brute force": lambda part: nearest_brute_force(part, unit),
        "scikit-learn KDTree": lambda part: torch.from_numpy(tree.query(part.double().numpy(), k=1)[1][:, 0]).int(),
    }
    ours = methods["native"](points)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for name, method in methods.items():
        part = points[: max(1, pairs // share[name])]
        index = method(part).long()
        gap = (part - unit[index]).double().norm(dim=1) - (part - unit[ours[: len(part)].long()]).double().norm(dim=1)
        if float(gap.abs().max()) > 1e-6 or (
            name == "torch brute force" and not torch.equal(index.int(), ours[: len(part)])
        ):
            raise HyperError(f"{name} finds other nodes than the compiled core; rebuild it and run the tests")
    for _ in range(repeats):  # interleaved, so that a busy machine slows all of them
        for name, method in methods.items():
            part = points[: max(1, pairs // share[name])]
            start = time.perf_counter()
            method(part)
            seconds[name].append((time.perf_counter() - start) / len(part) * pairs)
    for name in methods:
        yield {
            "op": "winding_nearest",
            "shape": [pairs, 2],
            "M": pairs,
            "bits": 6.5,
            "num_points": PAPER["num_points"],
            "kernel": f"native {_native.isa()}",
            "baseline": name,
            "pairs_measured": max(1, pairs // share[name]),
            "baseline_pairs_per_second": pairs / statistics.median(seconds[name]),
            "seconds_median": statistics.median(seconds["native"]),
            **ratios(seconds[name], seconds["native"]),
            "bandwidth_share": None,
            "threads": threads,
            "baseline_threads": 1 if name == "scikit-learn KDTree" else threads,
        }


def errors(weight: Tensor, source: str) -> Iterator[Row]:
    """Relative squared error of one matrix by rate, direction, box side and effort."""
    deviation = float(weight.std())
    rates: list[tuple[float, Mapping[str, object]]] = [(6.5, PAPER), *((bits, {}) for bits in (4.0, 5.0, 6.5, 8.0))]
    for bits, options in rates:
        for direction in DIRECTIONS:
            for box_side in (*(side * deviation for side in FIXED_SIDES), None):
                for effort in EFFORTS[:2] if box_side is None else EFFORTS[:1]:
                    given = {**options, "direction": direction, "box_side": box_side}
                    scheme = _scheme(weight.shape[0], weight.shape[1], bits, given)
                    start = time.perf_counter()
                    tensors = encode(weight, scheme, effort)
                    seconds = time.perf_counter() - start
                    decoded = hyperfunctions.get("winding").decode(tensors, scheme)
                    yield {
                        "op": "winding_error",
                        "source": source,
                        "shape": list(weight.shape),
                        "bits": scheme.bits,
                        "num_points": scheme.option("num_points"),
                        "num_shells": scheme.option("num_shells"),
                        "direction": direction,
                        "effort": effort,
                        "box": "chosen" if box_side is None else f"{box_side / deviation:.0f} deviations",
                        "box_side_over_deviation": float(tensors["shell_side"][0]) / deviation,
                        "relative_mse": float((decoded - weight).double().square().mean()) / deviation**2,
                        "encode_pairs_per_second": weight.numel() / 2 / seconds,
                    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_hyper.bench.winding", description="Speed and error of `winding`."
    )
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs of weights in the speed test")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of core and torch")
    parser.add_argument("--weights", nargs=2, metavar=("FILE", "TENSOR"), help="a trained matrix in a safetensors file")
    parser.add_argument(
        "--parts", nargs="+", choices=list(_PARTS), default=list(_PARTS), help="what to measure; a file keeps the rest"
    )
    given = parser.parse_args(arguments)
    measured = {_PARTS[part] for part in given.parts}
    kept = json.loads(given.json.read_text()) if given.json and given.json.is_file() else []
    rows: list[Row] = []
    common = environment("scikit-learn")

    def add(new: Iterator[Row], columns: Sequence[str]) -> None:
        for row in new:
            rows.append({**row, **common})
            print("  ".join(_shown(row[column]).ljust(20) for column in columns), flush=True)

    for threads in sorted({1, given.threads}) if "speed" in given.parts else ():
        torch.set_num_threads(threads)
        add(speeds(given.pairs, threads), ("baseline", "threads", "baseline_pairs_per_second", "ratio_median"))
    shown = ("source", "bits", "num_points", "direction", "effort", "box", "relative_mse")
    if "error" in given.parts:
        gaussian = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)) * 0.02
        add(errors(gaussian, "gaussian"), shown)
    if "error" in given.parts and given.weights:
        from safetensors import safe_open

        path, name = given.weights
        with safe_open(path, "pt") as file:
            add(errors(file.get_tensor(name).float(), name), shown)
    if given.json:
        rows += [row for row in kept if row["op"] not in measured]
        write_json(given.json, sorted(rows, key=lambda row: row["op"] != _PARTS["speed"]))
    return 0


def _scheme(out_features: int, in_features: int, bits: float, options: Mapping[str, object]) -> TensorScheme:
    rate, constants = hyperfunctions.get("winding").resolve(bits, options)
    return TensorScheme("winding", rate, out_features, in_features, incoherence=False, options=constants)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
