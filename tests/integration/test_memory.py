"""Resident memory of a loaded model and of calibration, measured in processes of their own."""

import os
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


@pytest.mark.slow
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


LIBRARIES = 16 << 20
"""Bytes for workspaces of linear algebra and the interpreter."""

UNMAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Has glibc return what is freed at once, as it does for matrices from 32 MB; of smaller ones it keeps some."""

CALIBRATE = """
import re, sys, torch, hf_hyper
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from hf_hyper.pipeline.calibrate import compress_loaded
from hf_hyper.plan import plan_shape

def resident(field):  # getrusage would count what the parent held when it forked
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def calibrate(hidden, ffn, layers):
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).eval()
    config = hf_hyper.HyperConfig(bits=4, effort="fast")
    linears = [(name, m.weight) for name, m in model.named_modules() if "proj" in name]
    plans = {name: plan_shape(config, tuple(weight.shape), False) for name, weight in linears}
    before = resident("VmRSS")
    compress_loaded(model, plans, torch.randint(64, (8, 32)), "fast", average=4.0)
    return resident("VmHWM") - before

calibrate(64, 64, 1)
print(calibrate(*(int(number) for number in sys.argv[1:])))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(_native.load() is None, reason="the torch reference searches with other memory")
@pytest.mark.parametrize("layers", [1, 8])
def test_calibration_stays_within_its_bound(layers: int) -> None:
    hidden, ffn = 128, 768
    command = [sys.executable, "-c", CALIBRATE, str(hidden), str(ffn), str(layers)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **UNMAP})
    assert finished.returncode == 0, finished.stderr
    wide = hidden**2 + ffn**2  # pairs of inputs and of outputs of the layer's largest weights
    moments = 8 * (4 * 2 * hidden**2 + 3 * wide)
    states = 4 * 8 * 32 * hidden * (layers + 1 + 2)  # those in the scratch file among them
    bound = moments + 36 * wide + 32 * hidden * ffn + states
    assert 8 * moments > bound + LIBRARIES  # moments of all layers would not fit
    assert int(finished.stdout) < bound + LIBRARIES, f"{finished.stdout} bytes at most, wanted {bound}"
