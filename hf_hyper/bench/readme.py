"""Renders the results section of the README from the JSON files beside this one.

    python -m hf_hyper.bench.readme          prints the section

No number in it is typed by hand; a test compares the README with what this prints.
"""

import json
from pathlib import Path
from typing import Any

from hf_hyper.bench.markdown import table
from hf_hyper.bench.readme_quality import domains, embeddings, quality, thoroughness
from hf_hyper.encoders import EFFORTS

__all__ = ["efforts", "products", "section"]

RESULTS = Path(__file__).parent / "results"

_OPTIONAL = {"quality_thoroughness": thoroughness, "quality_domains": domains, "embeddings": embeddings}
"""Results that may not have been measured."""

_PRODUCT_BITS = 4

Row = dict[str, Any]


def section() -> str:
    """The results section in Markdown, without a final newline."""
    return "\n\n".join(
        [
            "## Measured",
            quality(_read("quality"), _picture()),
            *(tell(_read(name)) for name, tell in _OPTIONAL.items() if (RESULTS / f"{name}.json").exists()),
            _encoder(_read("shift_mse")),
            *([efforts(_read("encode"))] if (RESULTS / "encode.json").exists() else []),
            products(_read("matmul")),
            _winding(_read("winding")),
        ]
    )


def _read(name: str) -> list[Row]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _picture() -> str | None:
    return "hf_hyper/bench/results/quality.png" if (RESULTS / "quality.png").exists() else None


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
    return f"{intro}\n\n{table(['bits', 'error', 'bound', 'speed'], cells)}"


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
    return f"{intro}\n\n{table(['bits', *(f'`{effort}`' for effort in EFFORTS)], cells)}"


def _point(row: Row) -> str:
    return f"{row['relative_mse']:.3g} at {row['weights_per_second_by_processor_time'] / 1e6:.2f} M/s"


def products(rows: list[Row]) -> str:
    """Table of `bench.matmul`: speed of `shift` over bfloat16 weights, by tokens and accuracy, over all shapes.

    Args:
        rows: Rows of `matmul.json`.
    """
    chosen = [row for row in rows if "shift" in row["kernel"] and row["baseline"] == "F.linear bfloat16"]
    chosen = [row for row in chosen if row["bits"] == _PRODUCT_BITS]
    shapes = {tuple(row["shape"]) for row in chosen}
    found: dict[tuple[int, str], list[float]] = {}
    for row in chosen:
        found.setdefault((row["M"], row["kernel"].split()[-1]), []).append(row["ratio_median"])
    intro = (
        f"**Products.** Times as fast as `F.linear` with bfloat16 weights, `shift` at {_PRODUCT_BITS} bits, rotations "
        f"included: least and most of {len(shapes)} shapes of layers of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B, "
        f"medians, {chosen[0]['threads']} threads ({chosen[0]['device']}, {chosen[0]['isa']}). `exact` holds "
        "activations of bfloat16 in 16 bits after their rotation, `int8` (`HF_HYPER_ACTIVATIONS=int8`) in 8 where that "
        "is faster.\n\n    python -m hf_hyper.bench.matmul --json matmul.json"
    )
    counts = sorted({tokens for tokens, _ in found})
    cells = [[str(tokens), *(_range(found.get((tokens, name))) for name in ("exact", "int8"))] for tokens in counts]
    return f"{intro}\n\n{table(['tokens', '`exact`, the default', '`int8`'], cells)}"


def _range(values: list[float] | None) -> str:
    return "the same" if values is None else f"{min(values):.2f} to {max(values):.2f}"


def _winding(rows: list[Row]) -> str:
    tree = next(row for row in rows if row["op"] == "winding_nearest" and "KDTree" in row["baseline"])
    return (
        "**`winding`.** Nearest orbit point at the paper's setting (U = 1600): "
        f"{tree['ratio_median']:.0f} times as fast as scikit-learn's KD-tree (from {tree['ratio_min']:.0f} to "
        f"{tree['ratio_max']:.0f}), same points.\n\n    python -m hf_hyper.bench.winding --json winding.json"
    )


if __name__ == "__main__":
    print(section())
