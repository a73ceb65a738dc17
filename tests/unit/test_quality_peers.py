"""The peers of the quality benchmark are what they claim to be."""

import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_hyper.bench.peers import PEERS, Task, gptq_folder, llama_recipes
from hf_hyper.bench.peers.uncalibrated import round_to_nearest
from hf_hyper.bench.quality_methods import decoder_linears
from hf_hyper.errors import ConfigError, HyperError


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_on_its_own_grid_is_exact(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (4, 128), generator=generator)
    codes[:, ::64], codes[:, 1::64] = 0, 2**bits - 1
    weight = (codes - 2 ** (bits - 1)) * 0.125
    decoded, stored = round_to_nearest(weight, bits)
    torch.testing.assert_close(decoded, weight, rtol=0, atol=0)
    assert stored == weight.numel() * bits + 8 * (16 + bits)


def test_round_to_nearest_errs_by_half_a_step():
    weight = torch.randn(8, 172, generator=torch.Generator().manual_seed(0))
    decoded, stored = round_to_nearest(weight, 4)
    for start in range(0, 172, 64):
        part = weight[:, start : start + 64]
        step = (part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)) / 15
        error = (decoded[:, start : start + 64] - part).abs().amax(1)
        # A whole step: the zero point is rounded too, and may cut the end of the range by half a step.
        assert bool((error <= 1.02 * step).all())
    assert stored == 8 * (172 * 4 + 3 * 20)


def test_round_to_nearest_of_zeros():
    decoded, _ = round_to_nearest(torch.zeros(2, 64), 4)
    assert not decoded.any()


def pack_rows(codes, bits):
    """Codes `[n, columns]` as GPTQ packs them along the first axis, by way of Python's whole numbers."""
    columns = []
    for column in codes.T.tolist():
        number = sum(code << position * bits for position, code in enumerate(column))
        columns.append([number >> 32 * word & 0xFFFFFFFF for word in range(len(column) * bits // 32)])
    words = torch.tensor(columns, dtype=torch.int64).T
    return (words - (words >> 31 << 32)).to(torch.int32).contiguous()


def write_gptq(folder, bits, *, shuffled=False, layout="gptq"):
    """One layer `fc` of 32 outputs and 128 inputs in groups of 64; returns its weight."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (128, 32), generator=generator)
    zeros = torch.randint(1, 2**bits, (2, 32), generator=generator)
    scales = torch.rand(2, 32, generator=generator).half()
    group = torch.arange(128) // 64
    if shuffled:
        group = group[torch.randperm(128, generator=generator)]
    tensors = {
        "fc.qweight": pack_rows(codes, bits),
        "fc.qzeros": pack_rows((zeros - 1).T, bits).T.contiguous(),
        "fc.scales": scales,
        "fc.g_idx": group.int(),
    }
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": {"bits": bits, "checkpoint_format": layout}}
    (folder / "config.json").write_text(json.dumps(config))
    return (scales.float()[group] * (codes - zeros[group])).T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_folder_is_decoded_exactly(tmp_path, bits):
    weight = write_gptq(tmp_path, bits)
    ((name, decoded, stored),) = gptq_folder.read_gptq_folder(tmp_path, ["fc"])
    assert name == "fc"
    torch.testing.assert_close(decoded, weight, rtol=0, atol=0)
    assert stored == 32 * 128 * bits + 2 * 32 * (16 + bits)


def test_order_of_inputs_counts_where_it_says_something(tmp_path):
    weight = write_gptq(tmp_path, 4, shuffled=True)
    ((_, decoded, stored),) = gptq_folder.read_gptq_folder(tmp_path, ["fc"])
    torch.testing.assert_close(decoded, weight, rtol=0, atol=0)
    assert stored == 32 * 128 * 4 + 2 * 32 * 20 + 128 * 32


def test_gptq_folder_of_another_kind(tmp_path):
    write_gptq(tmp_path, 4)
    with pytest.raises(HyperError, match="does not quantize head"):
        list(gptq_folder.read_gptq_folder(tmp_path, ["head"]))
    write_gptq(tmp_path, 4, layout="marlin")
    with pytest.raises(HyperError, match="is in the format 'marlin', wanted 'gptq'"):
        list(gptq_folder.read_gptq_folder(tmp_path, ["fc"]))


@pytest.fixture
def task(stories):
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    windows = torch.randint(512, (3, 16), generator=torch.Generator().manual_seed(0))
    return Task(stories, model, decoder_linears(model), windows)


def test_gptq_calibrates_on_the_windows(task, tmp_path, monkeypatch):
    seen = []

    class Model:
        @staticmethod
        def load(path, config, **options):
            assert (path, config.group_size) == (str(task.model_path.resolve()), 64)
            return Model()

        def quantize(self, examples, batch_size):
            seen.extend(example["input_ids"] for example in examples)

        def save(self, folder):
            shutil.copytree(tmp_path, folder)

    weight = write_gptq(tmp_path, 3)
    stand_in = ModuleType("gptqmodel")
    vars(stand_in).update(GPTQModel=Model, QuantizeConfig=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "gptqmodel", stand_in)
    layer = Task(task.model_path, task.model, {"fc": torch.nn.Linear(128, 32)}, task.windows)
    ((_, decoded, _),) = PEERS["gptq"].quantize(layer, "3")
    torch.testing.assert_close(decoded, weight, rtol=0, atol=0)
    assert torch.equal(torch.stack(seen), task.windows)


def test_autoround_calibrates_on_the_windows(task, tmp_path, monkeypatch):
    seen = {}

    class AutoRound:
        def __init__(self, model, tokenizer, **options):
            assert model is not task.model
            seen.update(options)

        def quantize_and_save(self, folder, format):
            assert format == "auto_gptq"
            shutil.copytree(tmp_path, f"{folder}/model-w4g64")

    weight = write_gptq(tmp_path, 4)
    stand_in = ModuleType("auto_round")
    vars(stand_in).update(AutoRound=AutoRound)
    monkeypatch.setitem(sys.modules, "auto_round", stand_in)
    layer = Task(task.model_path, task.model, {"fc": torch.nn.Linear(128, 32)}, task.windows)
    ((_, decoded, _),) = PEERS["autoround"].quantize(layer, "4")
    torch.testing.assert_close(decoded, weight, rtol=0, atol=0)
    assert torch.equal(torch.cat(seen["dataset"]), task.windows)
    assert (seen["nsamples"], seen["seqlen"], seen["bits"], seen["iters"]) == (3, 16, 4, 200)


def test_importance_is_the_mean_square_of_inputs(task):
    inputs = []
    layer = task.linears["model.layers.2.mlp.down_proj"]
    hook = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    found = llama_recipes.importance(task.model, task.linears, task.windows)
    hook.remove()
    wanted = torch.cat(inputs).flatten(0, 1).square().mean(0)
    torch.testing.assert_close(found["model.layers.2.mlp.down_proj"], wanted)
    assert found.keys() == task.linears.keys()
    assert not any(linear._forward_pre_hooks for linear in task.linears.values())


@pytest.mark.parametrize("wrap", [False, True], ids=["rows", "wrapped"])
def test_weights_pass_through_gguf_unharmed(task, monkeypatch, wrap):
    sizes = {}

    def keep(source, target, recipe, matrix):
        shutil.copy(source, target)
        sizes.update({name: values.numel() for name, values in matrix.items()})

    monkeypatch.setattr(llama_recipes, "_quantize", keep)
    decoded = list(llama_recipes.llama_recipe(task, "Q4_K_M", wrap=wrap))
    assert [name for name, _, _ in decoded] == list(task.linears)
    for name, weight, stored in decoded:
        assert torch.equal(weight, task.linears[name].weight)
        assert stored == 32 * weight.numel()
    assert sizes["blk.0.ffn_gate.weight"] == (256 if wrap else 64)


def test_layers_that_llama_cpp_does_not_know(task):
    strange = Task(task.model_path, task.model, {"model.magic": torch.nn.Linear(64, 64)}, task.windows)
    with pytest.raises(ConfigError, match=r"model\.magic has no name in llama\.cpp's Llama"):
        list(llama_recipes.llama_recipe(strange, "Q4_0"))


@pytest.mark.parametrize(
    ("method", "recipe", "stored"),
    [("gguf", "Q8_0", 8.5), ("gguf-wrap", "Q4_0", 4.5), ("gguf-wrap", "Q4_K_S", 4.5)],
)
def test_llama_cpp_itself(task, method, recipe, stored):
    pytest.importorskip("llama_cpp")
    name = "model.layers.4.mlp.up_proj"
    layer = Task(task.model_path, task.model, {name: task.linears[name]}, task.windows)
    ((_, decoded, bits),) = PEERS[method].quantize(layer, recipe)
    weight = task.linears[name].weight.detach()
    assert bits == stored * weight.numel()
    error = (decoded - weight).square().mean() / weight.square().mean()
    assert float(error) < (1e-4 if recipe == "Q8_0" else 0.02)
