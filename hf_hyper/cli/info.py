"""`hf-hyper info`: show size, rate and error of every compressed tensor

Reads headers only, so a model on the Hub is described without downloading its weights.
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_hyper.pipeline.report import Report

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="Hub id or local folder")
    parser.add_argument("--json", metavar="OUT", help="also write the numbers to this file")
    parser.add_argument("--plot", metavar="OUT.png", help="draw the tensors (needs matplotlib)")


def run(arguments: argparse.Namespace) -> None:
    """Print the table, write JSON and plot if asked."""
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs the package matplotlib, which is not installed: pip install matplotlib")

    from hf_hyper.errors import ConfigError
    from hf_hyper.pipeline.report import summarize, write_json
    from hf_hyper.pipeline.source import is_gguf

    if is_gguf(arguments.model):
        raise ConfigError(f"{arguments.model} is a GGUF file, wanted a Hub id or a folder; compress it first")
    report = summarize(arguments.model)
    _show(report)
    if arguments.json is not None:
        write_json(arguments.json, report.to_dict())
    if arguments.plot is not None:
        _plot(report, arguments.plot)


def _show(report: Report) -> None:
    width = max((len(record.name) for record in report.tensors), default=0)
    if report.tensors:
        print(f"{'tensor':<{width}}  {'shape':>13}  function  bits  bits/weight  error")
    for record in report.tensors:
        error = "-" if record.relative_error is None else f"{record.relative_error:.5f}"
        print(
            f"{record.name:<{width}}  {_shape(record.shape):>13}  {record.hyperfunction:<8}  "
            f"{record.bits:>4g}  {record.bits_per_weight:>11.3f}  {error}"
        )
    if report.tensors:
        print()
        print(
            f"compressed     {len(report.tensors)} tensors, {report.compressed_weights:,} weights, "
            f"{report.compressed_bytes / 1e6:.2f} MB, {report.bits_per_weight:.3f} bits per weight with all overheads"
        )
    else:
        print("compressed     nothing: this model was not made by hf-hyper")
    print(
        f"uncompressed   {report.uncompressed_tensors} tensors, {report.uncompressed_weights:,} weights, "
        f"{report.uncompressed_bytes / 1e6:.2f} MB"
    )
    ratio = report.bytes_16bit / report.size_bytes
    print(f"total          {report.size_bytes / 1e6:.2f} MB, {ratio:.2f}x smaller than 16-bit")
    if report.relative_error is not None:
        print(f"error          {report.relative_error:.5f} of the squared norm, mean over compressed weights")


def _shape(shape: tuple[int, ...]) -> str:
    """`5 x 7`, `8 x 64 x 32` with experts in front; the sides of a kernel are joined: `64 x 32 x 3x3`."""
    if len(shape) == 2:
        return f"{shape[0]:>5} x {shape[1]:<5}"
    return f"{shape[0]} x {shape[1]} x {'x'.join(map(str, shape[2:]))}"


def _plot(report: Report, path: str) -> None:
    """One dot a tensor in model order, one colour a kind of layer; the rate where no errors are known."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    measured = report.relative_error is not None
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for kind in dict.fromkeys(record.name.rpartition(".")[2] for record in report.tensors):
        chosen = [(i, r) for i, r in enumerate(report.tensors) if r.name.rpartition(".")[2] == kind]
        heights = [r.relative_error if measured else r.bits_per_weight for _, r in chosen]
        axes.plot([i for i, _ in chosen], heights, "o", markersize=4, label=kind)  # pyright: ignore[reportArgumentType]
    axes.set_xlabel("tensor, in model order")
    axes.set_ylabel("squared error relative to the weight" if measured else "bits per weight")
    axes.set_ylim(bottom=0)
    if report.tensors:
        axes.set_title(f"{report.bits_per_weight:.3f} bits per weight")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
