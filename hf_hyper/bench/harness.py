"""What benchmarks of kernels share: interleaved timing, read bandwidth, random codes, and the facts of every row.

Two candidates are timed in turns, so that a busy machine slows both, and compared by the ratios of the turns. Weights
rotate over copies that together exceed the last-level cache, as the layers of a model do: a weight that stays in the
cache between calls would flatter whichever kernel reads more bytes. GPUs are timed by their own events.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_hyper import _native, codec
from hf_hyper.scheme import TensorScheme

__all__ = [
    "CACHE_BYTES",
    "PAPER",
    "Timing",
    "compare",
    "environment",
    "random_tensors",
    "ratios",
    "read_bandwidth",
    "stopwatch",
]

CACHE_BYTES = 64 << 20
"""Bytes that copies of a weight fill at least: twice the 32 MiB last-level cache of the machine of record."""

PAPER = {"num_points": 1600, "num_shells": 3, "direction": "lattice"}
"""Constants of `winding` in arXiv 2409.00592, where a code has 13 bits a pair."""

Timing = dict[str, list[float]]
"""Seconds per call by candidate, one entry a turn."""


def stopwatch(device: str = "cpu") -> Callable[[], float]:
    """Start a clock; the function returned gives the seconds since, on a GPU those of its work."""
    if torch.device(device).type != "cuda":
        started = time.perf_counter()
        return lambda: time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()

    def stop() -> float:
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return stop


def compare(
    candidates: Mapping[str, Callable[[int], object]], turns: int, seconds: float = 0.02, device: str = "cpu"
) -> Timing:
    """Time candidates in turns.

    Args:
        candidates: Functions of the number of the call, which chooses the copy of the weight.
        turns: Turns of every candidate.
        seconds: Length of a turn at least; at least one call.
        device: Where the candidates run.

    Returns:
        Seconds per call by candidate, `turns` entries each.
    """
    calls: dict[str, int] = {}
    for name, candidate in candidates.items():
        candidate(0)
        stop = stopwatch(device)
        candidate(1)
        calls[name] = max(1, int(seconds / max(stop(), 1e-6)))
    result: Timing = {name: [] for name in candidates}
    number = 2
    for _ in range(turns):
        for name, candidate in candidates.items():
            stop = stopwatch(device)
            for _ in range(calls[name]):
                candidate(number)
                number += 1
            result[name].append(stop() / calls[name])
    return result


def ratios(baseline: list[float], own: list[float]) -> dict[str, float]:
    """Median, minimum and maximum over the turns of the baseline's time over ours."""
    by_turn = [other / mine for other, mine in zip(baseline, own, strict=True)]
    return {"ratio_median": statistics.median(by_turn), "ratio_min": min(by_turn), "ratio_max": max(by_turn)}


def read_bandwidth(threads: int, turns: int = 7, device: str = "cpu") -> float:
    """Bytes per second that `threads` threads or a GPU read from memory, best of some turns: a sum of float32 numbers.

    Args:
        threads: Threads of torch.
        turns: Turns.
        device: Whose memory.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    size = 4 << 30 if torch.device(device).type == "cuda" else 256 << 20  # far beyond the cache, and launches
    numbers = torch.ones(size // 4, device=device)
    best = float("inf")
    for _ in range(turns):
        stop = stopwatch(device)
        numbers.sum()
        best = min(best, stop())
    torch.set_num_threads(before)
    return size / best


def random_tensors(scheme: TensorScheme, device: str = "cpu") -> dict[str, Tensor]:
    """Stored tensors of `shift` with random codes, every one of which is valid, and scales of one."""
    specs = codec.tensor_specs(scheme)
    codes = torch.randint(-(2**31), 2**31, specs["codes"].shape, dtype=torch.int64, device=device).to(torch.int32)
    ones = {n: torch.ones(s.shape, dtype=s.dtype, device=device) for n, s in specs.items() if n != "codes"}
    return {"codes": codes, **ones}


def environment(*packages: str, device: str = "cpu") -> dict[str, Any]:
    """Where a row was measured: `device`, `isa`, `versions`, `commit` and the machine's `load`.

    Args:
        packages: Distributions whose versions matter besides torch; those not installed are left out.
        device: Torch device of the measurement.
    """
    on_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "isa": None if on_cuda or _native.load() is None else _native.isa(),
        "versions": {**_versions(("torch", *packages, *(["triton"] if on_cuda else []))), **_toolkit(on_cuda)},
        "commit": _commit(),
        "load": _load(),
    }


@functools.cache
def _processor() -> str:
    cores = f"{os.cpu_count()} cores"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name")) + f", {cores}"
    except (OSError, StopIteration):
        return f"{platform.machine()}, {cores}"


@functools.cache
def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


@functools.cache
def _commit() -> str | None:
    """Commit of the source tree this file is in; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return finished.stdout.strip() or None if finished.returncode == 0 else None


def _toolkit(on_cuda: bool) -> dict[str, str]:
    """CUDA or ROCm that torch was built with."""
    built = {"cuda": torch.version.cuda, "rocm": torch.version.hip} if on_cuda else {}
    return {name: version for name, version in built.items() if version is not None}


def _load() -> float | None:
    """Mean number of runnable processes over the last minute; above the number of cores, times are doubtful."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
