"""The rows of `bench.quality` for people: a table, and a picture of KL divergence against bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_hyper.bench.quality_methods import OURS

__all__ = ["draw", "format_table", "label"]

Row = dict[str, Any]


def label(row: Row) -> str:
    """Name of a row's method with its bits or recipe, such as `gptq 4` or `gguf Q4_K_M`."""
    return f"{row['method']} {row.get('recipe') or format(row['bits'], 'g')}"


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a table; `ours/peer` is the mean KL of our first method at the same code bits over the row's."""
    ours = {(row["bits"], row["text"]): row for row in reversed(rows) if row["method"] in OURS}
    lines = [
        f"{'method':<18}{'bits/weight':>12}{'KL mean':>10}{'KL 99 %':>10}{'KL max':>9}{'top-1':>8}"
        f"{'ppl':>9}{'ref ppl':>9}{'ours/peer':>11}{'seconds':>9}  text"
    ]
    for row in rows:
        if "skipped" in row:
            lines.append(f"{row['method']:<18}  skipped: {row['skipped']}")
            continue
        rival = ours.get((row["bits"], row["text"]))
        ratio = (
            "" if rival is None or rival is row or not row["kl_mean"] else f"{rival['kl_mean'] / row['kl_mean']:.3f}"
        )
        lines.append(
            f"{label(row):<18}{row['bits_per_weight']:>12.3f}{row['kl_mean']:>10.4f}"
            f"{row['kl_p99']:>10.3f}{row['kl_max']:>9.3f}{row['top1']:>8.3f}{row['ppl']:>9.3f}{row['ref_ppl']:>9.3f}"
            f"{ratio:>11}{row['seconds']:>9.1f}  {row['text']}"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw KL divergence against bits per weight on the first text, a line for every method, as a PNG."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if "skipped" not in row]
    measured = [row for row in measured if row["text"] == measured[0]["text"]]
    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in measured):
        points = sorted((row["bits_per_weight"], row["kl_mean"]) for row in measured if row["method"] == method)
        rates, divergences = zip(*points, strict=True)
        width = 2.4 if method in OURS else 1.2
        axes.plot(rates, divergences, marker="o", markersize=4, label=method, linewidth=width)
    axes.set(
        yscale="log",
        xlabel="bits per weight, everything counted",
        ylabel="KL divergence from the original, nats a token",
        title=f"{measured[0]['model']}, {measured[0]['text']}",
    )
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)
