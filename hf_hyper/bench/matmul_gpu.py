"""The part of `bench.matmul` that runs on GPUs.

Every candidate is captured into a CUDA graph of some calls in a row, each on another copy of the weight, and the graph
is timed by the device's events: neither the host nor the cache that a weight would stay in between calls counts.
Candidates that cannot be captured are left out.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_hyper import codec
from hf_hyper.bench.harness import compare, random_tensors, ratios
from hf_hyper.errors import HyperError
from hf_hyper.kernels import cuda, cuda_winding, ops, reference
from hf_hyper.scheme import TensorScheme

__all__ = ["case"]

CACHE_BYTES = 256 << 20
"""Bytes that copies of a weight fill, beyond any GPU's cache."""

MAX_CALLS = 64
"""Calls in a graph at most; weights of which so many stay in the cache are timed there."""

MAX_ERROR = 0.01
"""Relative error above which a result is wrong rather than rounded: bfloat16 output alone costs 0.002."""

Row = dict[str, Any]


def case(
    scheme: TensorScheme,
    tokens: Sequence[int],
    turns: int,
    bandwidth: float,
    rivals: Mapping[str, Callable[[int, Tensor], Tensor]],
    device: str,
) -> Iterator[Row]:
    """Rows of one weight for every number of tokens; see `bench.matmul.case`.

    Args:
        scheme: Shape and way of storage.
        tokens: Numbers of tokens.
        turns: Interleaved turns.
        bandwidth: Bytes per second that the device's memory delivers.
        rivals: Products of other packages, functions of the number of the call and the activations.
        device: Torch device.

    Raises:
        HyperError: A result is wrong.
    """
    rows, columns = scheme.out_features, scheme.in_features
    kernel, way = {
        "shift": ("cuda.matmul_shift", cuda.way),
        "winding": ("cuda.matmul_winding", cuda_winding.way),
    }[scheme.hyperfunction]
    size = codec.bits_per_weight(scheme) / 8 * scheme.num_weights
    calls = min(MAX_CALLS, max(2, int(CACHE_BYTES / size) + 1))
    stored = [list(random_tensors(scheme, device).values()) for _ in range(calls)]
    plain = [torch.randn(rows, columns, device=device).bfloat16() for _ in range(min(calls, 16))]
    names = codec.tensor_specs(scheme)
    for count in tokens:
        x = torch.randn(count, columns, device=device).bfloat16()
        wanted = reference.matmul(x.float(), dict(zip(names, stored[0], strict=True)), scheme)
        error = float((ops.matmul(x, stored[0], scheme.key).float() - wanted).norm() / wanted.norm())
        if not error < MAX_ERROR:
            raise HyperError(f"{scheme.key}, {count} tokens: relative error {error:.3g}; run the tests marked cuda")
        candidates: dict[str, Callable[[int], Tensor]] = {
            "own": lambda number, x=x: ops.matmul(x, stored[number], scheme.key),
            "F.linear bfloat16": lambda number, x=x: linear(x, plain[number % len(plain)]),
            **{name: lambda number, x=x, rival=rival: rival(number, x) for name, rival in rivals.items()},
        }
        graphs = {}
        for name, candidate in candidates.items():
            try:
                graphs[name] = _captured(candidate, calls)
            except RuntimeError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
        times = {name: [t / calls for t in turn] for name, turn in compare(graphs, turns, device=device).items()}
        median = statistics.median(times["own"])
        for baseline in [name for name in times if name != "own"]:
            yield {
                "op": "matmul",
                "shape": [rows, columns],
                "M": count,
                "bits": scheme.bits,
                "kernel": f"{kernel} {way(count, x.dtype)}",
                "baseline": baseline,
                "seconds_median": median,
                "baseline_seconds_median": statistics.median(times[baseline]),
                **ratios(times[baseline], times["own"]),
                "gigabytes_per_second": size / median / 1e9,
                "bandwidth_share": size / median / bandwidth,
                "threads": None,
            }


def _captured(candidate: Callable[[int], Tensor], calls: int) -> Callable[[int], None]:
    """A graph of all calls, after two that compile and fill caches on a stream of their own, as captures need."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in (0, 1):
            candidate(number)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            candidate(number)
    return lambda number: graph.replay()
