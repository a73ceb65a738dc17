"""Progress bars: shown on a terminal, absent from pipes and logs."""

import functools
import os
import sys

import tqdm
from huggingface_hub import constants
from transformers.utils import logging

__all__ = ["quiet_unless_watched"]


def quiet_unless_watched() -> None:
    """Switch progress bars off unless stderr is a terminal; `HF_HUB_DISABLE_PROGRESS_BARS` decides where it is set."""
    setting = constants.HF_HUB_DISABLE_PROGRESS_BARS
    if setting is None:
        setting = not sys.stderr.isatty()
    if setting:
        logging.disable_progress_bar()
        # transformers' GGUF reader draws a bar of its own, which no setting reaches.
        tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)  # pyright: ignore
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
