"""GPTQ as GPTQModel ships it (PyPI `gptqmodel`): symmetric, groups of 64, its own defaults otherwise."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from hf_hyper.bench.peers.base import GROUP_SIZE, Decoded, Task
from hf_hyper.bench.peers.gptq_folder import read_gptq_folder

__all__ = ["gptq"]


def gptq(task: Task, bits: str) -> Iterator[Decoded]:
    """Every layer under GPTQ, in float32, calibrated on the windows of the task."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default on a machine of two cores is one too few
    from gptqmodel import GPTQModel, QuantizeConfig  # pyright: ignore[reportMissingImports]

    path = Path(task.model_path)
    examples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in task.windows]
    with tempfile.TemporaryDirectory() as folder, _working_in(folder):
        model = GPTQModel.load(
            str(path.resolve() if path.exists() else task.model_path),
            QuantizeConfig(bits=int(bits), group_size=GROUP_SIZE),
            device=str(task.model.device),
            dtype=torch.float32,
        )
        model.quantize(examples, batch_size=1)
        target = Path(folder) / "model"
        model.save(str(target))
        del model
        yield from read_gptq_folder(target, task.linears)


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    """GPTQModel writes logs into the current folder; let it be this one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
