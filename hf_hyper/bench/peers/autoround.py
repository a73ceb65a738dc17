"""AutoRound (PyPI `auto-round`): symmetric, groups of 64, by default or by its recipe `light`."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hf_hyper.bench.peers.base import GROUP_SIZE, Decoded, Task
from hf_hyper.bench.peers.gptq_folder import read_gptq_folder

__all__ = ["DEFAULT", "LIGHT", "autoround"]

DEFAULT = {"iters": 200}
LIGHT = {"iters": 50, "lr": 5e-3}
_BATCH = 8


def autoround(task: Task, bits: str, recipe: Mapping[str, Any] = DEFAULT) -> Iterator[Decoded]:
    """Every layer under AutoRound, calibrated on the windows of the task, its default batch of 8.

    Args:
        task: The model.
        bits: Code bits.
        recipe: `DEFAULT` or `LIGHT`, as AutoRound has them; windows take the place of their sequences.
    """
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports]

    windows = task.windows
    rounder = AutoRound(
        copy.deepcopy(task.model),
        AutoTokenizer.from_pretrained(task.model_path),
        bits=int(bits),
        group_size=GROUP_SIZE,
        sym=True,
        dataset=list(windows.split(_BATCH)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=_BATCH,
        **recipe,
        device_map=str(task.model.device),
    )
    with tempfile.TemporaryDirectory() as folder:
        rounder.quantize_and_save(folder, format="auto_gptq")
        written = next(Path(folder).rglob("config.json")).parent
        yield from read_gptq_folder(written, task.linears)
