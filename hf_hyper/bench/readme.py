"""Renders the results section of the README from the JSON files beside this one.

    python -m hf_hyper.bench.readme          prints the section

No number in it is typed by hand; a test compares the README with what this prints.
"""

import json
from pathlib import Path
from typing import Any

from hf_hyper.encoders import EFFORTS

__all__ = ["efforts", "section"]

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def section() -> str:
    """The results section in Markdown, without a final newline."""
    return "\n\n".join(
        [
            "## Measured",
            _quality(_read("quality") + _read("quality_calibrated")),
            _encoder(_read("shift_mse")),
            *([efforts(_read("encode"))] if (RESULTS / "encode.json").exists() else []),
            _winding(_read("winding")),
        ]
    )


def _read(name: str) -> list[Row]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _quality(rows: list[Row]) -> str:
    first = rows[0]
    intro = (
        f"**Quality.** SmolLM2-135M, weights taken off their quantization grid, decoder linears only, "
        f"{first['tokens']} tokens of WikiText-2 validation in windows of {first['seq_len']}, float32; perplexity of "
        f"the original {first['ref_ppl']:.2f}. KL is to the original, in nats a token.\n\n"
        "    python -m hf_hyper.bench.offgrid twin\n"
        "    python -m hf_hyper.bench.quality --model twin --text wiki.valid.raw --json quality.json"
    )
    if calibrated := [row for row in rows if "rounding" in row]:
        methods = " ".join(dict.fromkeys(row["rounding"] for row in calibrated))
        intro += (
            f"\n    python -m hf_hyper.bench.quality --model twin --text wiki.valid.raw --methods {methods} "
            f"--effort {calibrated[0]['effort']} --calibration {calibrated[0]['calibration']} "
            "--json quality_calibrated.json"
        )
    ordered = sorted(rows, key=lambda row: (-round(row["bits_per_weight"]), row["kl_mean"]))
    cells = [
        [
            f"**{row['method']} {row['bits']}**"
            if row["method"] in ("shift", "fit", "fisher")
            else f"{row['method']} {row['bits']}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['kl_mean']:.3f}",
            f"{row['top1']:.1%}",
            f"{row['ppl']:.2f}",
        ]
        for row in ordered
    ]
    names = (
        "`shift` is this package without calibration, `fit` with; `fisher` leaves out the fit of the scales, `plain` "
        "is `shift` with LDLQ as published, on the same text at the same effort; `nf4` is bitsandbytes (block 64, "
        "`dq`: scales quantized again); `rtn` is round-to-nearest, asymmetric, groups of 64."
    )
    return f"{intro}\n\n{_table(['method', 'bits per weight', 'KL', 'same top token', 'perplexity'], cells)}\n\n{names}"


def _encoder(rows: list[Row]) -> str:
    full = {row["bits"]: row for row in rows if row["survivor_bits"] == 16}
    device = full[4]["device"]
    intro = (
        "**The code alone.** Mean squared error of `shift` on unit Gaussian weights, full search, beside the least "
        "that any code can have; weights encoded per second of processor time on "
        f"{full[4]['threads']} threads ({device}, shared with other work).\n\n"
        "    python -m hf_hyper.bench.shift_mse --json shift_mse.json"
    )
    cells = [
        [
            str(bits),
            f"{row['mse']:.3g}",
            f"{row['mse_bound']:.3g}",
            f"{row['weights_per_second_by_processor_time'] / 1e6:.2f} M/s",
        ]
        for bits, row in sorted(full.items())
    ]
    return f"{intro}\n\n{_table(['bits', 'error', 'bound', 'speed'], cells)}"


def efforts(rows: list[Row]) -> str:
    """Table of `bench.encode`: error of every effort by rate, and how fast it is.

    Args:
        rows: Rows of `encode.json`.
    """
    by_kernel = {row["kernel"]: row for row in rows if row["kernel"].startswith("shift ")}
    rates = sorted({row["bits"] for row in by_kernel.values()})
    first = next(iter(by_kernel.values()))
    intro = (
        "**Effort.** Mean squared error of a whole Gaussian matrix over the variance of its weights, rotations and "
        f"scales included, and weights encoded per second of processor time on {first['threads']} threads "
        f"({first['device']}).\n\n    python -m hf_hyper.bench.encode --json encode.json"
    )
    cells = [[str(bits), *(_point(by_kernel[f"shift {effort} {bits}"]) for effort in EFFORTS)] for bits in rates]
    return f"{intro}\n\n{_table(['bits', *(f'`{effort}`' for effort in EFFORTS)], cells)}"


def _point(row: Row) -> str:
    return f"{row['relative_mse']:.3g} at {row['weights_per_second_by_processor_time'] / 1e6:.2f} M/s"


def _winding(rows: list[Row]) -> str:
    tree = next(row for row in rows if row["op"] == "winding_nearest" and "KDTree" in row["baseline"])
    return (
        "**`winding`.** Nearest orbit point at the paper's setting (U = 1600): "
        f"{tree['ratio_median']:.0f} times as fast as scikit-learn's KD-tree (from {tree['ratio_min']:.0f} to "
        f"{tree['ratio_max']:.0f}), same points.\n\n    python -m hf_hyper.bench.winding --json winding.json"
    )


if __name__ == "__main__":
    print(section())
