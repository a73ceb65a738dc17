"""What benchmarks of kernels share: interleaved timing, read bandwidth, and the facts that every row carries.

Two candidates are timed in turns, so that a busy machine slows both, and compared by the ratios of the turns. Weights
rotate over copies that together exceed the last-level cache, as the layers of a model do: a weight that stays in the
cache between calls would flatter whichever kernel reads more bytes.
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

from hf_hyper import _native

__all__ = ["CACHE_BYTES", "PAPER", "Timing", "compare", "environment", "ratios", "read_bandwidth"]

CACHE_BYTES = 64 << 20
"""Bytes that copies of a weight fill at least: twice the 32 MiB last-level cache of the machine of record."""

PAPER = {"num_points": 1600, "num_shells": 3, "direction": "lattice"}
"""Constants of `winding` in arXiv 2409.00592, where a code has 13 bits a pair."""

Timing = dict[str, list[float]]
"""Seconds per call by candidate, one entry a turn."""


def compare(candidates: Mapping[str, Callable[[int], object]], turns: int, seconds: float = 0.02) -> Timing:
    """Time candidates in turns.

    Args:
        candidates: Functions of the number of the call, which chooses the copy of the weight.
        turns: Turns of every candidate.
        seconds: Length of a turn at least; at least one call.

    Returns:
        Seconds per call by candidate, `turns` entries each.
    """
    calls: dict[str, int] = {}
    for name, candidate in candidates.items():
        candidate(0)
        start = time.perf_counter()
        candidate(1)
        calls[name] = max(1, int(seconds / max(time.perf_counter() - start, 1e-6)))
    result: Timing = {name: [] for name in candidates}
    number = 2
    for _ in range(turns):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                candidate(number)
                number += 1
            result[name].append((time.perf_counter() - start) / calls[name])
    return result


def ratios(baseline: list[float], own: list[float]) -> dict[str, float]:
    """Median, minimum and maximum over the turns of the baseline's time over ours."""
    by_turn = [other / mine for other, mine in zip(baseline, own, strict=True)]
    return {"ratio_median": statistics.median(by_turn), "ratio_min": min(by_turn), "ratio_max": max(by_turn)}


def read_bandwidth(threads: int, size: int = 256 << 20, turns: int = 7) -> float:
    """Bytes per second that `threads` threads read from memory, best of some turns: a sum over float32 numbers.

    Args:
        threads: Threads of torch.
        size: Bytes read in a turn; far beyond the cache.
        turns: Turns.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    numbers = torch.ones(size // 4)
    best = float("inf")
    for _ in range(turns):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(before)
    return size / best


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
        "versions": _versions(("torch", *packages)),
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


def _load() -> float | None:
    """Mean number of runnable processes over the last minute; above the number of cores, times are doubtful."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
