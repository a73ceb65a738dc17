"""The whole path through transformers: compress while loading, save, reload, generate, refuse."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

from hf_hyper import ConfigError, FormatError, HyperConfig, HyperLinear, ShapeError

PROMPT = "Once upon a time"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def load(folder: Path, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(3, 35)[None]).logits


@pytest.fixture(scope="module")
def compressed(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    load(stories, quantization_config=HyperConfig(bits=4), dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 3}, {"bits": 6.5, "hyperfunction": "winding"}], ids=str)
def test_reloaded_model_gives_the_same_bits(stories: Path, tmp_path: Path, options: dict) -> None:
    original = load(stories, dtype=torch.float32)
    model, info = AutoModelForCausalLM.from_pretrained(
        stories, quantization_config=HyperConfig(**options), dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert sum(isinstance(module, HyperLinear) for module in model.modules()) == 35
    assert all(parameter.device.type != "meta" for parameter in model.parameters())
    wanted, got = logits(original), logits(model)
    assert relative_error(got, wanted) < 0.15
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again), got)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(load(tmp_path / "twice")), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_generate(stories: Path, compressed: Path, dtype: torch.dtype) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    model = load(compressed, dtype=dtype)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 24
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert text.startswith(PROMPT)
    assert sum(word in text for word in (" there ", " was ", " a ", " little ")) >= 3, text


def test_file_holds_codes_and_the_sentinel(compressed: Path) -> None:
    with safe_open(compressed / "model.safetensors", "pt") as file:
        names = set(file.keys())
        sentinel = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
    assert sentinel.dtype == torch.uint8
    assert b"pip install hf-hyper" in bytes(sentinel.tolist())
    assert "model.layers.4.mlp.down_proj.codes" in names
    assert "model.embed_tokens.weight" in names
    assert [name for name in names if name.endswith("_proj.weight")] == ["model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.slow
def test_folder_without_the_package_fails_loudly(compressed: Path) -> None:
    program = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(compressed)!r})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "Unknown quantization type, got hyper" in run.stderr
    assert "RuntimeError" in run.stderr
    assert "q_proj.weight" in run.stderr


def copy_folder(source: Path, target: Path) -> None:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def test_newer_format_is_refused(compressed: Path, tmp_path: Path) -> None:
    copy_folder(compressed, tmp_path)
    edit_config(tmp_path, format_version=2)
    with pytest.raises(FormatError, match="upgrade with: pip install -U hf-hyper"):
        load(tmp_path)


def test_record_of_an_unknown_module_is_refused(compressed: Path, tmp_path: Path) -> None:
    copy_folder(compressed, tmp_path)
    edit_config(tmp_path, tensor_schemes={"model.layers.9.mlp.down_proj": {"bits": 4}})
    with pytest.raises(FormatError, match=r"do not exist in LlamaForCausalLM, the first is 'model.layers.9"):
        load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_names_the_tensor(stories: Path, tmp_path: Path, value: float) -> None:
    copy_folder(stories, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ShapeError, match=r"model.layers.2.mlp.up_proj: (nan|inf) at row 3, column 4"):
        load(tmp_path, quantization_config=HyperConfig(bits=4))


def names_of(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, HyperLinear)}


def small_llama(folder: Path, tied: bool) -> Path:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("skip", "left_out"),
    [
        (None, {"lm_head"}),
        (["model.layers.1"], {"layers.1."}),
        (["gate_proj", "lm_head"], {"gate_proj", "lm_head"}),
        ([r"model.layers.\d+.self_attn", "lm_head"], {"self_attn", "lm_head"}),
        ([], set()),
    ],
    ids=["default", "prefix", "suffix", "regex", "nothing"],
)
def test_modules_to_not_convert(tmp_path: Path, tied: bool, skip: list[str] | None, left_out: set[str]) -> None:
    small_llama(tmp_path / "a", tied)
    model = load(tmp_path / "a", quantization_config=HyperConfig(bits=4, modules_to_not_convert=skip))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wanted = {name for name in linear if not any(part in name for part in left_out | ({"lm_head"} if tied else set()))}
    assert names_of(model) == wanted
    before = logits(model)
    model.save_pretrained(tmp_path / "b")
    again = load(tmp_path / "b")
    assert names_of(again) == wanted
    assert torch.equal(logits(again), before)


def test_nothing_to_compress_is_an_error(tmp_path: Path) -> None:
    small_llama(tmp_path, tied=True)
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM is left to compress"):
        load(tmp_path, quantization_config=HyperConfig(modules_to_not_convert=["model"]))


def small_gpt2(folder: Path) -> Path:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_gpt2_keeps_its_transposed_layers(tmp_path: Path) -> None:
    small_gpt2(tmp_path / "a")
    original = load(tmp_path / "a", dtype=torch.float32)
    model = load(tmp_path / "a", quantization_config=HyperConfig(bits=8), dtype=torch.float32)
    assert len(names_of(model)) == 8
    assert relative_error(logits(model), logits(original)) < 0.02
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dequantized_model_saves_and_loads_as_a_plain_one(tmp_path: Path, architecture: str) -> None:
    (small_llama(tmp_path / "a", tied=True) if architecture == "llama" else small_gpt2(tmp_path / "a"))
    model = load(tmp_path / "a", quantization_config=HyperConfig(bits=4), dtype=torch.float32)
    before = logits(model)
    plain = model.dequantize()
    assert names_of(plain) == set()
    assert not hasattr(plain.config, "quantization_config")
    assert not any(module.training for module in plain.modules())
    assert torch.allclose(logits(plain), before, atol=1e-3)
    plain.save_pretrained(tmp_path / "b")
    assert torch.allclose(logits(load(tmp_path / "b")), before, atol=1e-3)


def test_saved_model_can_be_dequantized(tmp_path: Path) -> None:
    small_llama(tmp_path / "a", tied=True)
    model = load(tmp_path / "a", quantization_config=HyperConfig(bits=4), dtype=torch.float32)
    before = logits(model)
    model.save_pretrained(tmp_path / "b")
    plain = model.dequantize()
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    assert torch.allclose(logits(plain), before, atol=1e-3)


def test_weight_missing_from_the_checkpoint_leaves_a_plain_layer(stories: Path, tmp_path: Path) -> None:
    copy_folder(stories, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = load(tmp_path, quantization_config=HyperConfig(bits=4), dtype=torch.float32)
    layer = model.model.layers[1].mlp.up_proj
    assert type(layer) is nn.Linear
    assert 0 < float(layer.weight.detach().std()) < 1
    assert "model.layers.1.mlp.up_proj" not in model.config.quantization_config.tensor_schemes
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))


@pytest.mark.parametrize("change", ["remove", "shorten"])
def test_damaged_folder_is_refused(compressed: Path, tmp_path: Path, change: str) -> None:
    copy_folder(compressed, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.codes"
    if change == "remove":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((FormatError, RuntimeError), match=r"up_proj.codes|mismatched"):
        load(tmp_path)


def test_base_model_loads_from_a_folder_with_a_head(compressed: Path, tmp_path: Path) -> None:
    whole = load(compressed)
    base, info = AutoModel.from_pretrained(compressed, output_loading_info=True)
    assert not info["missing_keys"]
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        wanted = whole.model(tokens).last_hidden_state
        assert torch.equal(base.eval()(tokens).last_hidden_state, wanted)
        base.save_pretrained(tmp_path)
        assert torch.equal(AutoModel.from_pretrained(tmp_path).eval()(tokens).last_hidden_state, wanted)


def test_compressed_model_can_be_copied_and_pickled(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "_tqdm_active", True)
    model = load(stories, quantization_config=HyperConfig(bits=4), dtype=torch.float32)
    wanted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), wanted)


def test_assigning_the_weight_is_refused(compressed: Path) -> None:
    layer = load(compressed).model.layers[0].mlp.down_proj
    with pytest.raises(ConfigError, match="weight of a HyperLinear cannot be assigned"):
        layer.weight = nn.Parameter(torch.zeros(64, 172))


def test_upcast_in_place_changes_nothing(compressed: Path) -> None:
    """What `prepare_model_for_kbit_training` of PEFT does to every 16-bit parameter."""
    model = load(compressed)
    wanted = logits(model)
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    assert torch.equal(logits(model), wanted)


def test_moving_to_another_dtype_keeps_stored_tensors(compressed: Path) -> None:
    model = load(compressed)
    layer = model.model.layers[0].mlp.down_proj
    before = [tensor.clone() for tensor in layer.stored()]
    model.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    for tensor, wanted in zip(layer.stored(), before, strict=True):
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)


def test_gradient_reaches_the_embeddings(compressed: Path) -> None:
    model = load(compressed)
    model(torch.arange(3, 35)[None], labels=torch.arange(3, 35)[None]).loss.backward()
    grad = model.model.embed_tokens.weight.grad
    assert grad is not None
    assert float(grad.abs().max()) > 0
    assert all(parameter.grad is None for _, parameter in model.named_parameters() if not parameter.requires_grad)


def test_repr_tells_the_storage(compressed: Path) -> None:
    text = repr(load(compressed).model.layers[0].mlp.down_proj)
    assert "hyperfunction=shift, bits=4, bits_per_weight=4." in text


def test_one_config_serves_two_models(stories: Path, tmp_path: Path) -> None:
    config = HyperConfig(bits=4)
    first = load(stories, quantization_config=config)
    second = load(small_llama(tmp_path, tied=True), quantization_config=config)
    assert len(first.config.quantization_config.tensor_schemes) == 35
    assert len(second.config.quantization_config.tensor_schemes) == 14
    assert config.tensor_schemes == {}
