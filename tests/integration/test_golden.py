"""Files written by every released format version decode to the weights they stood for."""

from pathlib import Path

import pytest
import torch
from helpers import relative_error
from safetensors import safe_open

from hf_hyper import codec
from hf_hyper.kernels import ops
from hf_hyper.scheme import TensorScheme

FILES = sorted((Path(__file__).parent.parent / "golden").glob("format*/*.safetensors"))


def test_there_are_golden_files() -> None:
    assert len(FILES) >= 13


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_golden_file(path: Path) -> None:
    with safe_open(path, "pt") as file:
        scheme = TensorScheme.parse(file.metadata()["scheme"])
        tensors = {name: file.get_tensor(name) for name in codec.tensor_specs(scheme)}
        expected = file.get_tensor("expected")
    assert relative_error(codec.dequantize(tensors, scheme), expected) < 1e-6
    assert relative_error(ops.decode(list(tensors.values()), scheme.key, torch.float32), expected) < 1e-6
