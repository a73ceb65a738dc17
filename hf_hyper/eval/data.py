"""Text for evaluation: from a file, rows in memory, a named data set or the bundled play, cut into token windows.

Perplexity depends on how rows are joined and how windows are cut, so both are fixed here and nowhere else:
rows are joined by a blank line (the usual stream for WikiText-2), the whole stream is tokenized once with the special
tokens that the tokenizer adds by itself, and windows do not overlap. A remainder shorter than a window is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from hf_hyper.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextSource", "load_text", "windows"]

TextSource: TypeAlias = "str | Path | Sequence[str] | Dataset | None"

_BUNDLED = Path(__file__).parent / "texts" / "coriolanus.txt"
_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_WIKITEXT_NAMES = ("wikitext", "wikitext2", "wikitext-2", "wikitext-2-raw-v1")


def load_text(source: TextSource = None, *, split: str = "test") -> str:
    """One string of text from any source a user may name.

    Args:
        source: One of
            - None or `"bundled"`: the opening of Coriolanus that comes with the package (80 kB, public domain);
            - a path to a UTF-8 text file, taken as it is, except that a file named `wiki.*.raw` (WikiText's own form, a
              row a line) becomes the stream that the data set of that name gives;
            - a list of strings, or a `datasets.Dataset` with a column `text` or a single column of strings;
            - a data set for `datasets.load_dataset`, written `NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT`; `wikitext-2`
              stands for `Salesforce/wikitext:wikitext-2-raw-v1`.
        split: Split of a named data set that names none itself.

    Raises:
        ConfigError: The source does not exist, cannot be read as text, or holds nothing but white space.
        ImportError: A data set was asked for and `datasets` is not installed.

    Example:
        >>> load_text(["one", "two"])
        'one\\n\\ntwo'
    """
    if source is None or source == "bundled":
        text = _BUNDLED.read_text(encoding="utf-8")
    elif isinstance(source, str | Path):
        text = _read_file(Path(source)) if Path(source).is_file() else _load_named(str(source), split)
    else:
        text = "\n\n".join(_rows(source))
    if not text.strip():
        raise ConfigError(f"text {_describe(source)} is empty; give a source with some text in it")
    return text


def windows(tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int, sequences: int | None = None) -> Tensor:
    """Tokenize a text once and cut it into windows that do not overlap.

    Args:
        tokenizer: Tokenizer of the model to evaluate.
        text: The whole text.
        seq_len: Tokens a window, at least 2 (the first token of a window is never predicted).
        sequences: Number of windows, from the start of the text; None takes all that fit.

    Returns:
        `[n, seq_len]` int64 token ids.

    Raises:
        ConfigError: `seq_len` or `sequences` is out of range, or the text is too short for what was asked.
    """
    if seq_len < 2:
        raise ConfigError(f"seq_len is {seq_len}; a window needs 2 tokens or more")
    if sequences is not None and sequences < 1:
        raise ConfigError(f"sequences is {sequences}; give 1 or more, or None for the whole text")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    available = ids.numel() // seq_len
    wanted = available if sequences is None else sequences
    if available < max(wanted, 1):
        raise ConfigError(
            f"the text is too short: its {ids.numel()} tokens make {available} windows of {seq_len}, "
            f"{max(wanted, 1)} wanted; lower the number of sequences or seq_len, or give a longer text"
        )
    return ids[: wanted * seq_len].view(wanted, seq_len)


def _read_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"text file {path} is not UTF-8 ({error}); convert it to UTF-8 text") from error
    if path.match("wiki.*.raw"):
        # A row is a line with its newline, or the empty string where the line is blank.
        text = "\n\n".join(f"{line}\n" if line.strip() else "" for line in text.removesuffix("\n").split("\n"))
    return text


def _load_named(name: str, split: str) -> str:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"text {name!r} is not a file, and reading it as a data set needs the package `datasets`: "
            'pip install "hf-hyper[eval]", or give the path of a text file'
        ) from error
    repository, _, rest = name.partition(":")
    config, _, own_split = rest.partition(":")
    if repository in _WIKITEXT_NAMES:
        repository, config = _WIKITEXT[0], config or _WIKITEXT[1]
    try:
        dataset = datasets.load_dataset(repository, config or None, split=own_split or split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"text {name!r} is neither a file nor a data set that can be loaded ({error}); check the path, or give "
            "NAME:CONFIG:SPLIT of a data set, or 'bundled' for the text that comes with the package"
        ) from error
    return "\n\n".join(_rows(dataset))


def _rows(source: Any) -> list[str]:
    """The strings of a list or of the text column of a data set."""
    columns = getattr(source, "column_names", None)
    if columns is None:
        rows = list(source)
    elif "text" in columns or len(columns) == 1:
        rows = list(source["text" if "text" in columns else columns[0]])
    else:
        raise ConfigError(
            f"data set has the columns {columns} and none is called 'text'; rename one, or pass a list of strings"
        )
    for index, row in enumerate(rows):
        if not isinstance(row, str):
            raise ConfigError(f"row {index} of the text is a {type(row).__name__}; every row must be a string")
    return rows


def _describe(source: TextSource) -> str:
    return repr(str(source)) if isinstance(source, str | Path) else f"given as a {type(source).__name__}"
