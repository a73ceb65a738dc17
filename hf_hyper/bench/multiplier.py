"""Search for the constant of `shift`: the odd multiplier whose byte sums encode Gaussian weights best.

    python -m hf_hyper.bench.multiplier [--json OUT] [--candidates 2048] [--tiles 8] [--final-tiles 1024]

Candidates are random odd 32-bit numbers. All encode the same unit Gaussian tiles with the full search at 1 to 6 bits,
and a candidate's score is the mean over rates and tiles of log(mse / mse of the reference); the logarithm is taken tile
by tile, because at 5 and 6 bits one sample in the far tail can outweigh ten tiles. Each stage keeps the best sixth on
four times as many tiles. Those left, the reference (exllamav3's 0x83DCD12D) and QTIP's 1MAD, which adds a constant to
the product, are ranked on tiles that no stage has seen, so that the winner's lead is not the luck of its selection.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_hyper.bench.harness import environment
from hf_hyper.bench.shift_mse import STARTING_GAIN, tile_errors
from hf_hyper.hyperfunctions.shift import STATE_BITS, TILE_WEIGHTS
from hf_hyper.pipeline.report import write_json

__all__ = ["main", "search"]

RATES = (1, 2, 3, 4, 5, 6)
REFERENCE = (0x83DCD12D, 0)
"""Multiplier and addend of exllamav3's `mul1` code."""

ONE_MAD = (34038481, 76625530)
"""Multiplier and addend of 1MAD, arXiv 2406.11235."""

KEEP_ONE_IN = 6
MORE_TILES = 4
FINALISTS = 4

Observable = tuple[int, int]
Row = dict[str, Any]


def observable_sums(observable: Observable) -> Tensor:
    """Byte sums of `state * multiplier + addend mod 2^32`: `[65536]` int64."""
    multiplier, addend = observable
    product = torch.arange(1 << STATE_BITS, dtype=torch.int64) * multiplier + addend
    return torch.stack([product >> shift & 0xFF for shift in (0, 8, 16, 24)]).sum(0)


def errors_by_rate(observable: Observable, tiles: Tensor, threads: int) -> Tensor:
    """Mean squared error of every tile at every rate: `[rates, n]` float64."""
    sums = observable_sums(observable)
    return torch.stack([tile_errors(tiles, bits, STATE_BITS, sums, STARTING_GAIN[bits], threads) for bits in RATES])


def score(errors: Tensor, reference: Tensor) -> float:
    """Mean of log(mse / mse of the reference) over rates and tiles, for errors `[rates, n]`."""
    return float((errors / reference).log().mean())


def search(candidates: int, tiles: int, threads: int, generator: torch.Generator) -> list[Observable]:
    """Multipliers that survive the stages, best first.

    Args:
        candidates: Random odd numbers of the first stage.
        tiles: Tiles of the first stage.
        threads: Threads of the encoder.
        generator: Source of the candidates and the tiles.
    """
    drawn = torch.randint(0, 1 << 31, (candidates,), generator=generator)
    field = [(int(number) * 2 + 1, 0) for number in drawn]
    while len(field) > FINALISTS:
        weights = torch.randn(tiles, TILE_WEIGHTS, generator=generator)
        reference = errors_by_rate(REFERENCE, weights, threads)
        scores = {candidate: score(errors_by_rate(candidate, weights, threads), reference) for candidate in field}
        field = sorted(field, key=scores.__getitem__)[: max(FINALISTS, len(field) // KEEP_ONE_IN)]
        lead = scores[field[0]]
        print(f"{len(scores):5d} candidates on {tiles:4d} tiles: best 0x{field[0][0]:08X} {lead:+.2%}", flush=True)
        tiles *= MORE_TILES
    return field


def ranking(finalists: list[Observable], weights: Tensor, threads: int) -> list[Row]:
    """One row for every observable and rate, and one with `bits` None for the mean over the rates."""
    reference = errors_by_rate(REFERENCE, weights, threads)
    rows: list[Row] = []
    for observable in [*finalists, REFERENCE, ONE_MAD]:
        errors = errors_by_rate(observable, weights, threads)
        relative = (errors - reference) / reference.mean(1, keepdim=True)  # paired, tile by tile
        by_rate = [
            {
                "bits": bits,
                "mse": float(errors[i].mean()),
                "mse_se": float(errors[i].std() / len(weights) ** 0.5),
                "difference": float(relative[i].mean()),
                "difference_se": float(relative[i].std() / len(weights) ** 0.5),
            }
            for i, bits in enumerate(RATES)
        ]
        mean = {
            "bits": None,
            "score": score(errors, reference),
            "score_se": float((errors / reference).log().mean(0).std() / math.sqrt(len(weights))),
        }
        common = {"op": "shift_multiplier", "multiplier": f"0x{observable[0]:08X}", "addend": observable[1]}
        rows += [{**common, **row, "tiles": len(weights)} for row in [mean, *by_rate]]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_hyper.bench.multiplier", description="Search for the multiplier of `shift`."
    )
    parser.add_argument("--json", type=Path, help="write the final ranking to this file")
    parser.add_argument("--candidates", type=int, default=2048, help="random multipliers in the first stage")
    parser.add_argument("--tiles", type=int, default=8, help="tiles in the first stage")
    parser.add_argument("--final-tiles", type=int, default=1024, help="fresh tiles of the final ranking")
    parser.add_argument("--seed", type=int, default=0, help="seed of candidates and tiles")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the encoder")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the encoder has threads of its own; torch's would only spin beside them
    generator = torch.Generator().manual_seed(given.seed)
    finalists = search(given.candidates, given.tiles, given.threads, generator)
    weights = torch.randn(given.final_tiles, TILE_WEIGHTS, generator=generator)
    rows = ranking(finalists, weights, given.threads)
    print("multiplier  addend      mean           " + "".join(f"{bits} bit           " for bits in RATES))
    width = 1 + len(RATES)
    for first in range(0, len(rows), width):
        mean, *by_rate = rows[first : first + width]
        parts = [f"{mean['score']:+.2%}±{mean['score_se']:.2%}"]
        parts += [f"{row['difference']:+.2%}±{row['difference_se']:.2%}" for row in by_rate]
        print(f"{mean['multiplier']}  {mean['addend']:8d}  " + "  ".join(parts), flush=True)
    if given.json:
        common = {**environment(), "seed": given.seed, "candidates": given.candidates}
        write_json(given.json, [{**row, **common} for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
