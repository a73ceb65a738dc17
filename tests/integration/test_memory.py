"""Resident memory of a loaded model, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_hyper import HyperConfig, _native, codec
from hf_hyper.scheme import TensorScheme

WORKSPACE = 4 << 20
"""Bytes that loading and a forward pass may keep beside the stored tensors: activations and caches."""

MEASURE = """
import gc, re, sys, torch, hf_hyper
from pathlib import Path
from transformers import AutoModelForCausalLM

def resident(file):  # private memory, and the pages of the mapped file
    kibibytes = int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    mapped = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            mapped = line.endswith(str(file))
        elif mapped and line.startswith("Rss:"):
            kibibytes += int(line.split()[1])
    return kibibytes * 1024

def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        model(torch.zeros(1, 2, dtype=torch.long))
    gc.collect()
    return model

root = Path(sys.argv[1])
load(root / "small")  # what the first model of a process costs is not the second's
file = root / "large" / "model.safetensors"
before = resident(file)
model = load(root / "large")
print(resident(file) - before, file.stat().st_size)
"""


def random_tensors(weight: Tensor, scheme: TensorScheme, effort: str, *, name: str = "weight") -> dict[str, Tensor]:
    """Any bit string is a code; searching for the best one would take a minute."""
    specs = codec.tensor_specs(scheme)
    stored = {name: torch.full(spec.shape, 0.02, dtype=spec.dtype) for name, spec in specs.items() if name != "codes"}
    return {"codes": torch.randint(-(2**31), 2**31, specs["codes"].shape).to(torch.int32), **stored}


def save(folder: Path, layers: int) -> None:
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=1024, intermediate_size=2816, num_attention_heads=16, vocab_size=256
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "plain")
    AutoModelForCausalLM.from_pretrained(
        folder / "plain", dtype=torch.bfloat16, quantization_config=HyperConfig(bits=8, effort="fast")
    ).save_pretrained(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(_native.load() is None, reason="the torch reference decodes whole weights")
def test_loaded_model_is_as_large_as_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "quantize", random_tensors)
    save(tmp_path / "small", 1)
    save(tmp_path / "large", 3)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    grown, stored = (int(number) for number in finished.stdout.split())
    assert stored > 30e6
    assert 0.9 * stored < grown < 1.1 * stored + WORKSPACE, f"{grown} bytes resident for a file of {stored}"
