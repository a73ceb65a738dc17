"""Fused mixtures of experts: compressed on the fly, in memory and as plain modules; saved, loaded, restored."""

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from upcycled import upcycled

import hf_hyper
from hf_hyper.cli import main
from hf_hyper.errors import ConfigError, FormatError
from hf_hyper.eval import evaluate_model
from hf_hyper.nn.experts import FUSED, HyperExpertBank, HyperExperts, join_experts, split_experts
from hf_hyper.nn.replace import hyper_modules
from hf_hyper.pipeline.calibration_text import calibration_windows
from hf_hyper.pipeline.report import summarize
from hf_hyper.quantizer import choice

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 1}
SIZES |= {"num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1}
EXPERTS_ONLY = [r".*self_attn.*", "lm_head"]


def qwen() -> PreTrainedModel:
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 40, "num_experts": 4, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes, num_key_value_heads=2, decoder_sparse_step=1))


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=40, num_local_experts=4, num_key_value_heads=2))


def gpt_oss() -> PreTrainedModel:
    sizes = {"intermediate_size": 40, "num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 16}
    return GptOssForCausalLM(GptOssConfig(**SIZES, **sizes))


def olmoe() -> PreTrainedModel:
    return OlmoeForCausalLM(OlmoeConfig(**SIZES, intermediate_size=40, num_experts=4, num_key_value_heads=2))


def deepseek() -> PreTrainedModel:
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 40, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
    sizes |= {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **sizes, num_key_value_heads=4, first_k_dense_replace=1))


def llama4() -> PreTrainedModel:
    sizes = {"intermediate_size": 40, "intermediate_size_mlp": 40, "num_local_experts": 4, "head_dim": 16}
    fields = {**SIZES, **sizes, "num_experts_per_tok": 1, "num_key_value_heads": 2, "interleave_moe_layer_step": 1}
    return Llama4ForCausalLM(Llama4TextConfig(**fields))


ZOO = {make.__name__: make for make in (qwen, mixtral, gpt_oss, olmoe, deepseek, llama4)}


@pytest.fixture(params=ZOO)
def make(request: pytest.FixtureRequest) -> Callable[[], PreTrainedModel]:
    """Makers of small models of every kind of experts, with weights that matter."""
    return lambda: sized(ZOO[request.param]())


@torch.no_grad()
def sized(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights as large as in a trained model; biases too, where there are any."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(torch.arange(24).view(2, 12)).logits


def banks(model: nn.Module) -> dict[str, HyperExpertBank]:
    return {name: layer for name, layer in hyper_modules(model) if isinstance(layer, HyperExpertBank)}


def test_model_survives_compression_saving_and_loading(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    original = make()
    original.save_pretrained(tmp_path / "original")
    config = hf_hyper.HyperConfig(bits=6, effort="fast")
    load = type(original).from_pretrained
    model, info = load(tmp_path / "original", quantization_config=config, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    found = banks(model.eval())
    assert len(found) == (2 if isinstance(model, DeepseekV3ForCausalLM) else 4)
    for name, bank in found.items():
        owner, _, key = name.rpartition(".")
        weight = original.get_parameter(f"{owner}.{FUSED[key]}")
        decoded = getattr(model.get_submodule(owner), FUSED[key])
        assert decoded.shape == weight.shape
        for one, other in zip(decoded, weight, strict=True):
            assert relative_error(one, other) < 0.03
        assert bank.bits_per_weight <= 8
    got = logits(model)
    model.save_pretrained(tmp_path / "compressed")
    again, info = load(tmp_path / "compressed", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again.eval()), got)

    report = summarize(tmp_path / "compressed")
    assert {record.name for record in report.tensors} == {name for name, _ in hyper_modules(model)}
    whole = summarize(tmp_path / "original")
    assert report.compressed_weights + report.uncompressed_weights == whole.uncompressed_weights
    assert all(0 < model.hf_quantizer.measured[name]["relative_error"] < 0.001 for name in found)

    plain = again.dequantize()
    assert {type(module) for module in plain.modules()} == {type(module) for module in original.modules()}
    assert relative_error(logits(plain), got) < 1e-4
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain").eval()), logits(plain))


def test_in_memory_gives_the_same_bits(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    config = hf_hyper.HyperConfig(bits=4, effort="fast")
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).eval()
    assert torch.equal(logits(hf_hyper.compress_model(model, config)), logits(loaded))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen", "mixtral", "gpt_oss"])
def test_experts_alone_stop_loaders_without_the_package(kind: str, tmp_path: Path) -> None:
    model = sized(ZOO[kind]())
    config = hf_hyper.HyperConfig(bits=4, effort="fast", modules_to_not_convert=EXPERTS_ONLY)
    hf_hyper.compress_model(model, config).save_pretrained(tmp_path)
    assert set(banks(model)) == {name for name, _ in hyper_modules(model)}
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again.eval()), logits(model))
    load = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    finished = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert finished.returncode == 1
    assert "RuntimeError" in finished.stderr


@pytest.mark.parametrize("name", ["experts", "experts.down_proj", r".*\.hyper_down"])
def test_experts_can_be_left_out_by_name(name: str) -> None:
    model = sized(mixtral())
    hf_hyper.compress_model(model, hf_hyper.HyperConfig(effort="fast", modules_to_not_convert=[name, "lm_head"]))
    left = {"experts": set()}.get(name, {"hyper_gate_up"})
    assert {bank.rpartition(".")[2] for bank in banks(model)} == left
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, nn.Parameter)
    assert torch.isfinite(logits(model)).all()


def test_one_bank_alone_saves_and_loads(tmp_path: Path) -> None:
    model = sized(qwen())
    model.save_pretrained(tmp_path / "original")
    config = hf_hyper.HyperConfig(bits=4, effort="fast", modules_to_not_convert=["experts.gate_up_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=config).eval()
    model.save_pretrained(tmp_path / "compressed")
    stored = load_file(tmp_path / "compressed" / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in stored
    assert "model.layers.1.mlp.experts.hyper_down.codes" in stored
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again.eval()), logits(model))


@pytest.mark.slow
def test_winding_within_a_bound(tmp_path: Path) -> None:
    model = sized(mixtral())
    model.save_pretrained(tmp_path)
    config = hf_hyper.HyperConfig(bits=8, hyperfunction="winding", winding={"loss_max": 0.01})
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).eval()
    assert len(banks(again)) == 4
    for name, bank in banks(again).items():
        owner, _, key = name.rpartition(".")
        loss = (bank.weight - model.get_parameter(f"{owner}.{FUSED[key]}")).abs().mean()
        assert 0.004 < loss <= 0.01  # a code has fewer bits than it may have


def test_any_module_with_experts() -> None:
    model = sized(gpt_oss())
    wanted = logits(hf_hyper.compress_module(copy.deepcopy(model), hf_hyper.HyperConfig(bits=6, effort="fast")))
    made = hf_hyper.compress_module(model, hf_hyper.HyperConfig(bits=6, effort="fast"))
    assert len(banks(made)) == 4
    again = hf_hyper.load_module(sized(gpt_oss()), made.state_dict(), made.hyper_config.to_dict())
    assert torch.equal(logits(again), wanted)


def test_copies_and_pickles(tmp_path: Path) -> None:
    model = hf_hyper.compress_model(sized(mixtral()), hf_hyper.HyperConfig(effort="fast"))
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, HyperExperts)
    arguments = torch.randn(3, 64), torch.tensor([[0, 2], [2, 3], [0, 3]]), torch.rand(3, 2)
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert type(other) is type(experts)
        assert torch.equal(other(*arguments), experts(*arguments))


def test_gradient_reaches_the_hidden_states() -> None:
    model = sized(gpt_oss())
    experts = model.model.layers[0].mlp.experts
    arguments = torch.tensor([[0, 2], [2, 3], [0, 3]]), torch.rand(3, 2)
    states = torch.randn(3, 64, requires_grad=True)
    experts(states, *arguments).square().sum().backward()
    assert states.grad is not None
    wanted = states.grad.clone()
    states.grad = None
    hf_hyper.compress_model(model, hf_hyper.HyperConfig(bits=8, effort="fast"))
    experts(states, *arguments).square().sum().backward()
    assert relative_error(states.grad, wanted) < 0.05


def test_split_experts_multiply_under_autocast() -> None:
    model = sized(gpt_oss())
    experts = model.model.layers[0].mlp.experts
    arguments = torch.randn(3, 64), torch.tensor([[0, 2], [2, 3], [0, 3]]), torch.rand(3, 2)
    with torch.no_grad():
        wanted = experts(*arguments)
        split_experts(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert (
                relative_error(model.model.layers[0].mlp.experts(*arguments), wanted) < 0.01
            )  # bfloat16: 0.004 a step


def test_decoded_weights_cannot_be_assigned() -> None:
    model = hf_hyper.compress_model(sized(mixtral()), hf_hyper.HyperConfig(effort="fast"))
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(ConfigError, match="gate_up_proj of HyperMixtralExperts cannot be assigned"):
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj)


def test_splitting_and_joining_change_nothing(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    classes, wanted = [type(module) for module in model.modules()], logits(model)
    split_experts(model)
    assert relative_error(logits(model), wanted) < 1e-5
    join_experts(model)
    assert [type(module) for module in model.modules()] == classes
    assert dict.fromkeys(before, True) == {
        name: torch.equal(parameter, before[name]) for name, parameter in model.named_parameters()
    }


def test_a_linear_router_stays() -> None:
    model = sized(mixtral())
    router = nn.Linear(64, 4, bias=False)
    model.model.layers[0].mlp.chooser = router
    hf_hyper.compress_model(model, hf_hyper.HyperConfig(effort="fast"))
    assert model.model.layers[0].mlp.chooser is router


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sized(mixtral()).save_pretrained(tmp_path / "original")
    assert main(["compress", str(tmp_path / "original"), str(tmp_path / "out"), "--effort", "fast"]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "model.layers.0.mlp.experts.hyper_gate_up    4 x 80 x 64  shift" in capsys.readouterr().out


def test_a_record_without_experts_is_refused(tmp_path: Path) -> None:
    model = hf_hyper.compress_model(sized(mixtral()), hf_hyper.HyperConfig(effort="fast"))
    name = next(iter(banks(model)))
    del model.config.quantization_config.tensor_schemes[name]["experts"]
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="has no field 'experts'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_no_conversion_of_transformers_touches_the_names() -> None:
    from transformers import conversion_mapping

    every = conversion_mapping._build_checkpoint_conversion_mapping()
    assert len(every) > 50
    for kind, conversions in every.items():
        saving = [conversion.reverse_transform() for conversion in reversed(conversions)]
        for steps, bank in itertools.product((saving, conversions), FUSED):
            name = f"model.layers.0.mlp.experts.{bank}.codes"
            for step in steps:
                name, _ = step.rename_source_key(name)
            assert name.endswith(f".experts.{bank}.codes"), kind


@pytest.mark.slow
def test_calibration_lowers_the_damage(stories: Path) -> None:
    """Experts of stories260K, calibrated on text that it writes and judged on other text that it writes."""
    original = upcycled(stories)
    original.name_or_path = str(stories)
    unseen = calibration_windows(original, "self", 2048, seed=1)
    damage = {}
    for calibration in (None, "self"):
        config = hf_hyper.HyperConfig(
            bits=3, effort="fast", calibration=calibration, calibration_tokens=4096, modules_to_not_convert=EXPERTS_ONLY
        )
        model = copy.deepcopy(original)
        model.name_or_path = str(stories)
        hf_hyper.compress_model(model, config)
        damage[calibration] = evaluate_model(model, unseen, original).to_dict()["kl_mean"]
        errors = [record.output_error for record in summarize(model).tensors]
        assert all(error is None or 0 < error < 0.1 for error in errors)
        assert (calibration is None) == all(error is None for error in errors)
    assert damage["self"] < 0.75 * damage[None]


def test_experts_that_cannot_be_compressed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 96, "num_local_experts": 4}
    model = JetMoeForCausalLM(JetMoeConfig(**{**SIZES, **sizes}))
    said: list[str] = []
    monkeypatch.setattr(choice.logger, "warning", said.append)
    hf_hyper.compress_model(model, hf_hyper.HyperConfig(effort="fast"))
    assert [text.partition(":")[0] for text in said] == ["JetMoeParallelExperts stays as it is"]
