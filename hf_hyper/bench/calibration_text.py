"""The text that the saved figures were calibrated on.

It is cut from the calibration set of EXL3: the folder `exllamav3/conversion/standard_cal_data` of
`turboderp-org/exllamav3` at 4f8ad01. Half is web pages; the rest is code, technical prose, several languages and
children's stories. Its Wikipedia articles are left out, since WikiText is what quality is measured on.

    python -m hf_hyper.bench.calibration_text FOLDER calib.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["compose", "main"]

SHARES = {
    "c4.utf8": 300_000,
    "code.utf8": 100_000,
    "technical.utf8": 70_000,
    "multilingual.utf8": 60_000,
    "tiny.utf8": 70_000,
}
"""Characters taken from the beginning of every file; about 173 thousand tokens of SmolLM2."""


def compose(folder: Path) -> str:
    """The text, `SHARES` one after the other with an empty line between them.

    Args:
        folder: Where the files are, in UTF-8.

    Raises:
        OSError: A file is missing.
        ValueError: A file is shorter than its share.
    """
    parts = []
    for name, share in SHARES.items():
        part = (folder / name).read_text(encoding="utf-8")[:share]
        if len(part) < share:
            raise ValueError(f"{folder / name} has {len(part)} characters, wanted at least {share}")
        parts.append(part)
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Write the text; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_hyper.bench.calibration_text",
        description="The text that the saved figures were calibrated on.",
    )
    parser.add_argument("folder", type=Path, help="standard_cal_data of exllamav3")
    parser.add_argument("output", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    try:
        options.output.write_text(compose(options.folder), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
