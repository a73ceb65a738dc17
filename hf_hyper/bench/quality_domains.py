"""Whether calibration on one kind of text helps on another: every text calibrates, every text measures.

    python -m hf_hyper.bench.quality_domains --model DIR --texts c4.utf8 code.utf8 --json OUT [--bits 3]
        [--methods fit plain] [--resume] [--sequences 16] [--seq-len 512] [--effort balanced]

Each text is cut in two. The first half calibrates, the second measures, so that what is measured was never seen even
where both are of one kind. Rows are those of `bench.quality`; `calibration` and `text` name the halves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_hyper.bench import quality
from hf_hyper.bench.quality_methods import METHODS
from hf_hyper.bench.quality_report import format_table
from hf_hyper.errors import HyperError
from hf_hyper.eval import load_text

__all__ = ["cross", "halves", "main"]

Row = dict[str, Any]


def halves(text: str) -> tuple[str, str]:
    """A text cut in two at the end of the line nearest after its middle, or there if it has a single line."""
    middle = len(text) // 2
    end = text.find("\n", middle) + 1
    middle = end if 0 < end < len(text) else middle
    return text[:middle], text[middle:]


def cross(model_path: str | Path, texts: Mapping[str, str], known: Sequence[Row] = (), **options: Any) -> Iterator[Row]:
    """Rows for every pair of a text that calibrates and one that measures.

    Args:
        model_path: Folder or Hub id of an uncompressed causal language model.
        texts: By name.
        known: Rows of earlier runs, not measured again.
        options: Of `quality.compare`.
    """
    parts = {name: halves(text) for name, text in texts.items()}
    measured = {f"{name}, second half": second for name, (_, second) in parts.items()}
    for name, (first, _) in parts.items():
        yield from quality.compare(
            model_path,
            measured,
            calibration=[first],
            calibration_name=f"{name}, first half",
            known=known,
            **options,
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_hyper.bench.quality_domains", description="Calibrate on one text, measure on another."
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of the uncompressed model")
    parser.add_argument("--texts", nargs="+", required=True, help="two text files or more, of different kinds")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has, and measure the others")
    parser.add_argument("--bits", type=float, nargs="+", default=[3], help="rates (default: 3)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["fit", "plain"])
    parser.add_argument("--sequences", type=int, default=16, help="windows of every text (default: 16)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--effort", default="balanced", help="of our own methods (default: balanced)")
    parser.add_argument("--calibration-tokens", type=int, default=32768, help="of a half, at most (default: 32768)")
    given = parser.parse_args(arguments)
    measure = partial(
        cross,
        given.model,
        bits=given.bits,
        methods=given.methods,
        sequences=given.sequences,
        seq_len=given.seq_len,
        effort=given.effort,
        calibration_tokens=given.calibration_tokens,
    )
    try:
        texts = {Path(source).name: load_text(source) for source in given.texts}
        rows = quality.run(partial(measure, texts), given.json, given.resume)
    except (HyperError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
