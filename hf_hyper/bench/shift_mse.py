"""`shift`: error and speed of the encoder by rate and effort, and the best gain.

    python -m hf_hyper.bench.shift_mse [--json OUT] [--tiles 512] [--threads N] [--multiplier C]

Samples are unit Gaussian, w / gain is encoded, and the error is taken after one least-squares scale over all tiles.
The gain is how far the input is shrunk before the search: below 1 at low rates, where centroids lie inside their
cells, and above 1 at high rates, where the byte sum ends at 3.3 deviations. It is the minimum of a parabola through
the errors on a grid of gains, on the same samples. Speed counts weights per second of wall time, and beside it per
second of processor time on each of the threads, which a busy machine disturbs less.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_hyper import _native
from hf_hyper.bench.harness import environment
from hf_hyper.hyperfunctions.shift import MULTIPLIER, STATE_BITS, TILE_WEIGHTS, byte_sums, states
from hf_hyper.pipeline.report import write_json

__all__ = ["DESIGN_MSE", "EFFORT_BITS", "STARTING_GAIN", "best_gain", "main", "tile_errors"]

EFFORT_BITS = (8, 10, 12, 13, 14, 15, 16)

DESIGN_EFFORT_BITS = (8, 10, 12, 14, 16)
DESIGN_MSE = {
    1: (0.302, 0.285, 0.280, 0.271, 0.269),
    2: (0.0870, 0.0804, 0.0744, 0.0707, 0.0688),
    3: (0.0273, 0.0230, 0.0199, 0.0186, 0.0178),
    4: (0.0091, 0.0068, 0.0054, 0.0051, 0.0047),
    5: (0.0035, 0.0023, 0.0017, 0.0015, 0.0013),
}
"""Errors of trellises of `DESIGN_EFFORT_BITS` state bits, the figures to compare with."""

STARTING_GAIN = {1: 0.88, 2: 1.0, 3: 1.05, 4: 1.08, 5: 1.1, 6: 1.14, 7: 1.18, 8: 1.22}
"""Centres of the grids on which the best gain is sought."""

Row = dict[str, Any]


def tile_errors(tiles: Tensor, bits: int, survivor_bits: int, sums: Tensor, gain: float, threads: int) -> Tensor:
    """Mean squared error of every tile after a least-squares scale common to all: `[n]` float64.

    Args:
        tiles: `[n, 256]` float32, unit variance.
        bits: Bits per weight.
        survivor_bits: Effort.
        sums: `[65536]` byte sum of every state.
        gain: The tiles are divided by it before the search.
        threads: Threads of the encoder.
    """
    codes = _native.shift_encode_observable(tiles / gain, bits, survivor_bits, sums, threads)
    exact = sums.double()
    decoded = ((exact - exact.mean()) / exact.std(correction=0))[states(codes, bits)]
    weights = tiles.double()
    scale = (weights * decoded).sum() / decoded.square().sum()
    return (weights - scale * decoded).square().mean(1)


def best_gain(bits: int, survivor_bits: int, sums: Tensor, tiles: Tensor, threads: int) -> float:
    """Gain of least error: the minimum of a parabola through five gains."""
    centre, step = STARTING_GAIN[bits], 0.04
    offsets = torch.arange(-2, 3, dtype=torch.float64)
    errors = [
        float(tile_errors(tiles, bits, survivor_bits, sums, centre + step * float(o), threads).mean()) for o in offsets
    ]
    powers = torch.stack([offsets**2, offsets, torch.ones_like(offsets)], 1)
    curve = torch.linalg.lstsq(powers, torch.tensor(errors, dtype=torch.float64)).solution
    vertex = -curve[1] / (2 * curve[0]) if curve[0] > 0 else torch.tensor(0.0)
    return round(centre + step * float(vertex.clamp(-2, 2)), 3)


def _measure(bits: int, survivor_bits: int, multiplier: int, tiles: Tensor, threads: int) -> Row:
    sums = byte_sums(multiplier)
    gain = best_gain(bits, survivor_bits, sums, tiles[: max(1, len(tiles) // 4)], threads)
    scaled = tiles / gain
    _native.shift_encode(scaled[:threads], bits, survivor_bits, multiplier, threads)
    wall, processor = time.perf_counter(), time.process_time()
    _native.shift_encode(scaled, bits, survivor_bits, multiplier, threads)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    errors = tile_errors(tiles, bits, survivor_bits, sums, gain, threads)
    mse = float(errors.mean())
    design = dict[int, float](zip(DESIGN_EFFORT_BITS, DESIGN_MSE.get(bits, ()), strict=False)).get(survivor_bits)
    return {
        "op": "shift_encode",
        "bits": bits,
        "survivor_bits": survivor_bits,
        "gain": gain,
        "mse": mse,
        "mse_se": float(errors.std() / len(errors) ** 0.5),
        "mse_bound": 4.0**-bits,
        "mse_design": design,
        "ratio_to_design": mse / design if design else None,
        "weights_per_second": tiles.numel() / wall,
        "weights_per_second_by_processor_time": threads * tiles.numel() / processor,
        "threads": threads,
        "tiles": len(tiles),
        "multiplier": f"0x{multiplier:08X}",
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_hyper.bench.shift_mse", description="Error and speed of the `shift` encoder."
    )
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--tiles", type=int, default=512, help="tiles of 256 weights at full effort, more below it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the encoder")
    parser.add_argument("--multiplier", type=lambda text: int(text, 0), default=MULTIPLIER, help="odd constant")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the encoder has threads of its own; torch's would only spin beside them
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(4 * given.tiles, TILE_WEIGHTS, generator=generator)
    common, rows = environment(), []
    print("bits  L'   gain       mse      +-    /design   Mweights/s  (by processor time)")
    for bits in range(1, 9):
        for survivor_bits in EFFORT_BITS:
            if survivor_bits < min(STATE_BITS, 2 * bits):
                continue  # raised to that by the encoder
            part = tiles[: given.tiles] if survivor_bits > 12 else tiles
            row = _measure(bits, survivor_bits, given.multiplier, part, given.threads)
            rows.append({**row, **common})
            ratio = f"{row['ratio_to_design']:.3f}" if row["ratio_to_design"] else "-"
            print(
                f"{bits:4d}  {survivor_bits:2d}  {row['gain']:5.3f}  {row['mse']:.3e}  {row['mse_se'] / row['mse']:.2%}"
                f"  {ratio:>6}  {row['weights_per_second'] / 1e6:9.3f}"
                f"  {row['weights_per_second_by_processor_time'] / 1e6:9.3f}",
                flush=True,
            )
    if given.json:
        write_json(given.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
