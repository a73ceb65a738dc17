"""Calibrated compression: through `from_pretrained`, the command line and in memory; better, reloadable, resumable."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import hf_hyper
from hf_hyper.cli import main
from hf_hyper.encoders.shift import DISTORTION
from hf_hyper.errors import ConfigError, HyperError
from hf_hyper.eval import evaluate_model, windows
from hf_hyper.pipeline import calibrate as calibration
from hf_hyper.pipeline.calibrate import compress_loaded
from hf_hyper.pipeline.calibration_text import calibration_windows
from hf_hyper.pipeline.compress import compress
from hf_hyper.pipeline.expected_losses import ExpectedLoss
from hf_hyper.pipeline.report import summarize
from hf_hyper.plan import plan_shape

TINY = Path(__file__).parents[3] / "shared" / "data" / "calib" / "tiny.utf8"
STORIES = TINY.read_text(encoding="utf-8") if TINY.exists() else ""
TEXTS = [STORIES[start : start + 1000] for start in range(0, 24000, 1000)]
pytestmark = pytest.mark.skipif(not STORIES, reason="the shared calibration texts are not beside the project")

CALIBRATED = {"bits": 3, "effort": "fast", "calibration": TEXTS, "calibration_tokens": 4096}


def kl(model: torch.nn.Module, original: torch.nn.Module, folder: Path) -> float:
    cut = windows(AutoTokenizer.from_pretrained(folder), STORIES[-20000:], 128, 16)
    return evaluate_model(model, cut, original).to_dict()["kl_mean"]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(__file__).parents[1] / "data" / "stories260K"


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=hf_hyper.HyperConfig(**CALIBRATED))


def test_calibration_is_worth_its_time(calibrated: torch.nn.Module, folder: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(folder)
    losses = {"fit": kl(calibrated, original, folder)}
    for name, options in {
        "fisher": {"rounding": "fisher"},
        "ldlq": {"rounding": "ldlq"},
        "plain": {"rounding": "plain"},
        "none": {"calibration": None},
    }.items():
        config = hf_hyper.HyperConfig(**{**CALIBRATED, **options})
        losses[name] = kl(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config), original, folder)
    assert losses["fit"] < losses["fisher"] < losses["ldlq"] < losses["plain"] < losses["none"]


def test_a_calibrated_model_is_stored_like_any_other(calibrated: torch.nn.Module, folder: Path, tmp_path: Path) -> None:
    calibrated.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(reloaded(ids).logits, calibrated(ids).logits)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["calibration"] == "24 texts"
    assert saved["calibration_tokens"] == 4096
    # What was left to learn is left to learn, and gradients of calibration are gone.
    assert all(parameter.grad is None for parameter in calibrated.parameters())


def test_fractional_rates(folder: Path) -> None:
    config = hf_hyper.HyperConfig(**{**CALIBRATED, "bits": 3.25, "rounding": "ldlq"})
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    layers = [module for module in model.modules() if isinstance(module, hf_hyper.HyperLinear)]
    weights = [layer.in_features * layer.out_features for layer in layers]
    spent = sum(layer.scheme.bits * size for layer, size in zip(layers, weights, strict=True)) / sum(weights)
    assert 3.25 * 0.98 <= spent <= 3.25


def rates(model: torch.nn.Module) -> tuple[list[float], float]:
    """Bits of every compressed layer, and their mean over weights."""
    layers = [module for module in model.modules() if isinstance(module, hf_hyper.HyperLinear)]
    weights = [layer.in_features * layer.out_features for layer in layers]
    bits = [layer.scheme.bits for layer in layers]
    return bits, sum(rate * size for rate, size in zip(bits, weights, strict=True)) / sum(weights)


@pytest.mark.parametrize("bits", [2.5, pytest.param(3, marks=pytest.mark.slow)])
def test_bits_go_where_the_loss_feels_them(bits: float, folder: Path, tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(folder)
    losses = {}
    for allocation in ("size", "loss"):
        config = hf_hyper.HyperConfig(**{**CALIBRATED, "bits": bits, "rounding": "fisher", "allocation": allocation})
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        losses[allocation] = kl(model, original, folder)
    found, mean = rates(model)
    assert bits * 0.995 <= mean <= bits
    assert len(set(found)) > 2
    assert losses["loss"] < 0.95 * losses["size"]

    records = summarize(model).tensors
    assert [record.bits for record in records] == found
    expected = sum(record.expected_loss for record in records)
    assert 0.7 * losses["loss"] < expected < 1.5 * losses["loss"]  # the sum over single tensors

    model.save_pretrained(tmp_path)
    ids = torch.arange(40).view(2, 20)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert rates(reloaded)[0] == found
    assert torch.equal(reloaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("max_kl", [0.4, 0.05])
def test_a_loss_is_asked_for_in_the_place_of_bits(max_kl: float, folder: Path, tmp_path: Path) -> None:
    assert main(["compress", str(folder), str(tmp_path / "out"), "--effort", "fast", "--bits", "auto", "--max-kl",
                 str(max_kl), "--calibration", str(TINY), "--calibration-tokens", "16384"]) == 0  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert 0.5 * max_kl < kl(model, AutoModelForCausalLM.from_pretrained(folder), folder) < 1.1 * max_kl
    saved = json.loads((tmp_path / "out" / "hyper_report.json").read_text())
    assert saved["bits"] == model.config.quantization_config.bits == pytest.approx(rates(model)[1])
    assert saved["max_kl"] == max_kl
    assert 0.95 * max_kl < sum(tensor["expected_loss"] for tensor in saved["tensors"]) <= max_kl


def test_one_measure_orders_the_weights_and_the_other_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    losses = {names[0]: ExpectedLoss(alone=1.0, among_others=9.0), names[1]: ExpectedLoss(alone=1.0, among_others=1.0)}
    monkeypatch.setattr(calibration, "expected_losses", lambda *_: losses)
    text = calibration_windows(AutoModelForCausalLM.from_pretrained(folder), TEXTS, 4096, 0)

    def measured(**options: float) -> dict[str, float]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        shape = tuple(model.get_submodule(names[0]).weight.shape)
        plans = {name: plan_shape(hf_hyper.HyperConfig(bits=8), shape, False) for name in names}
        found = compress_loaded(model, plans, text, "fast", rounding="fisher", **options)
        for name in names:
            bits = int(model.get_submodule(name).scheme.bits)
            assert found[name]["expected_loss"] == pytest.approx(DISTORTION[bits])
        return {name: model.get_submodule(name).scheme.bits for name in names}

    assert measured(average=3.0) == {names[0]: 4, names[1]: 2}
    assert measured(max_kl=0.08) == {names[0]: 4, names[1]: 2}
    monkeypatch.setattr(calibration, "expected_losses", lambda *_: {})
    with pytest.raises(ConfigError, match=r"no weight that calibration can round .* give bits, not max_kl"):
        measured(max_kl=0.08)


@pytest.mark.slow
def test_expected_losses_foretell_those_of_single_tensors(folder: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(folder)
    names = ["0.mlp.down_proj", "1.self_attn.q_proj", "2.self_attn.v_proj", "3.mlp.gate_proj"]
    text, found = calibration_windows(original, TEXTS, 4096, 0), []
    for name in (f"model.layers.{name}" for name in names):
        model = AutoModelForCausalLM.from_pretrained(folder)
        plan = plan_shape(hf_hyper.HyperConfig(bits=3), tuple(model.get_submodule(name).weight.shape), False)
        measured = compress_loaded(model, {name: plan}, text, "balanced", rounding="fisher", average=3.0)[name]
        assert model.get_submodule(name).scheme.bits == 3
        found.append(math.log(kl(model, original, folder) / measured["expected_loss"]))
    mean, deviation = -0.62, 0.27  # of all 35 tensors: `rounding/NOTES.md`
    assert all(abs(each - mean) < 3 * deviation for each in found)
    assert abs(statistics.fmean(found) - mean) < 3 * deviation / len(found) ** 0.5


@pytest.mark.parametrize(("effort", "search"), [("fast", "fast"), ("balanced", "best"), ("best", "best")])
def test_calibrated_weights_are_searched_in_full_from_balanced_on(
    effort: str, search: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, whole = set(), calibration.quantize_calibrated

    def note(weight, scheme, effort, knowledge, *, plain, name):
        seen.add(effort)
        return whole(weight, scheme, "fast", knowledge, plain=plain, name=name)

    monkeypatch.setattr(calibration, "quantize_calibrated", note)
    config = hf_hyper.HyperConfig(**{**CALIBRATED, "effort": effort, "rounding": "ldlq", "calibration_tokens": 1024})
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert seen == {search}


def test_rates_follow_the_loss_unless_told_otherwise(folder: Path) -> None:
    options = {**CALIBRATED, "bits": 3.5, "rounding": "fisher", "calibration_tokens": 1024}
    bits = []
    for allocation in (None, "loss", "size"):
        config = hf_hyper.HyperConfig(**{**options, "allocation": allocation})
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        bits.append(rates(model)[0])
        assert model.hf_quantizer.calibrated["allocation"] == (allocation or "loss")
    assert bits[0] == bits[1] != bits[2]
    assert set(bits[2]) == {3, 4}


@pytest.mark.slow
def test_the_model_writes_its_own_text(folder: Path) -> None:
    config = hf_hyper.HyperConfig(**{**CALIBRATED, "calibration": "self", "calibration_tokens": 1024})
    first, second = (AutoModelForCausalLM.from_pretrained(folder, quantization_config=config) for _ in range(2))
    codes = [model.model.layers[4].mlp.down_proj.codes for model in (first, second)]
    assert torch.equal(*codes)
    assert first.hf_quantizer.calibrated["calibration_tokens"] == 1024


def test_command_line_and_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS))
    options = ["--bits", "3", "--effort", "fast", "--calibration", str(text), "--calibration-tokens", "1024"]
    assert main(["compress", str(folder), str(tmp_path / "out"), *options]) == 0
    report = json.loads((tmp_path / "out" / "hyper_report.json").read_text())
    assert report["calibration"] == str(text)
    assert report["calibration_tokens"] == 1024
    assert all(0 < record["output_error"] < 0.5 for record in report["tensors"])
    assert "35 tensors" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: torch.nn.Module
) -> None:
    calls: list[str] = []
    whole = calibration.quantize_calibrated

    def stops(weight, scheme, effort, knowledge, *, plain, name):
        calls.append(name)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return whole(weight, scheme, effort, knowledge, plain=plain, name=name)

    monkeypatch.setattr(calibration, "quantize_calibrated", stops)
    config = hf_hyper.HyperConfig(**CALIBRATED)
    with pytest.raises(KeyboardInterrupt):
        compress(folder, tmp_path / "out", config, resume=True)
    assert not (tmp_path / "out").exists()

    compress(folder, tmp_path / "out", config, resume=True)
    assert len(calls) == 20 + 35 - 19
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in calibrated.state_dict().items():
        assert torch.equal(resumed[name], tensor), name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "deberta", "t5 encoder"])
def test_other_stacks_of_layers(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "bert":
        model = BertModel(BertConfig(**sizes, intermediate_size=80)).eval()
    elif kind == "deberta":  # layers return a pair, and run one projection on positions besides
        relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True}
        model = DebertaV2Model(DebertaV2Config(**sizes, **relative, intermediate_size=80)).eval()
    elif kind == "t5 encoder":
        config = T5Config(vocab_size=100, d_model=48, d_ff=80, d_kv=12, num_layers=2, num_heads=4)
        model = T5EncoderModel(config).eval()
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=48, n_layer=2, n_head=4)).eval()
    ids = torch.randint(100, (4, 128))
    with torch.no_grad():
        wanted = model(input_ids=ids)[0]
    config = hf_hyper.HyperConfig(bits=4, effort="fast")
    plans = {
        name: plan_shape(config, tuple(reversed(module.weight.shape)) if kind == "gpt2" else module.weight.shape, False)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and "lm_head" not in name
    }
    measured = compress_loaded(model, plans, ids, "fast")
    assert list(measured) == list(plans)
    inside = [name for name in plans if ".layer." in name or ".h." in name]
    assert len(plans) - len(inside) == (kind == "bert")  # the pooler
    assert all(measured[name]["output_error"] < 0.05 for name in inside)
    assert all("output_error" not in measured[name] for name in plans.keys() - set(inside))
    with torch.no_grad():
        error = (model(input_ids=ids)[0] - wanted).norm() / wanted.norm()
    assert error < 0.15


def test_models_without_outputs_for_every_token_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=80)).eval()
    name = "bert.encoder.layer.0.attention.self.query"
    plans = {name: plan_shape(hf_hyper.HyperConfig(), (48, 48), False)}
    ids = torch.randint(100, (2, 64))
    monkeypatch.setattr(calibration, "states_by_layer", lambda *_: pytest.fail("the text ran through the layers"))
    with pytest.raises(ConfigError, match=r"returns neither logits nor a last hidden state .* rounding='ldlq'"):
        compress_loaded(model, plans, ids, "fast")
    assert 0 < compress_loaded(model, plans, ids, "fast", rounding="ldlq")[name]["output_error"] < 0.05


def encoder_decoder(kind: str) -> torch.nn.Module:
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(vocab_size=50, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)
        )
    shared = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 50, "pad_token_id": 0}
    if kind == "bart":
        return BartForConditionalGeneration(BartConfig(**shared, **heads))
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(**shared, **heads, **tokens, num_mel_bins=16))


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_encoder_decoders_are_refused_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder_decoder(kind)
    refused = r"2 lists of equal layers \(.*encoder.*, .*decoder.*\), wanted one .* compress it without calibration"
    with pytest.raises(ConfigError, match=refused):
        hf_hyper.compress_model(model, hf_hyper.HyperConfig(calibration="default"))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(type(model), "_load_pretrained_model", None)  # weights are not looked at
    with pytest.raises(ConfigError, match=refused):
        type(model).from_pretrained(tmp_path, quantization_config=hf_hyper.HyperConfig(calibration="default"))
    hf_hyper.compress_model(model, hf_hyper.HyperConfig(effort="fast"))
    assert all(0 < record.relative_error < 0.02 for record in summarize(model).tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": 3}, "calibration is a int, wanted"),
        ({"calibration": []}, "calibration is a list, wanted"),
        ({"calibration": "default", "hyperfunction": "winding"}, "only 'shift' can use it"),
        ({"calibration": "default", "calibration_tokens": 0}, "calibration_tokens is 0"),
        ({"calibration": "default", "rounding": "nearest"}, "rounding is 'nearest', wanted one of"),
        ({"calibration": "default", "allocation": "fisher"}, "allocation is 'fisher', wanted one of 'size', 'loss'"),
        ({"allocation": "loss"}, "allocation 'loss' needs calibration .* got no calibration"),
        ({"calibration": "default", "rounding": "ldlq", "allocation": "loss"}, "needs .* got rounding 'ldlq'"),
    ],
    ids=["type", "empty", "winding", "tokens", "rounding", "allocation", "no text", "no gradients"],
)
def test_options_that_cannot_be_used(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf_hyper.HyperConfig(**options)


def test_a_text_that_is_too_short(folder: Path) -> None:
    config = hf_hyper.HyperConfig(calibration=["Once upon a time."])
    with pytest.raises(HyperError, match=r"calibration text has .* tokens, wanted at least"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("calibration", [None, TEXTS], ids=["free", "calibrated"])
def test_pruned_weights_in_hand_keep_their_zeros(folder: Path, calibration: list[str] | None) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[weight.abs() < weight.abs().median()] = 0
        zeros = weight == 0
    hf_hyper.compress_model(model, hf_hyper.HyperConfig(**{**CALIBRATED, "calibration": calibration}))
    assert bool((model.model.layers[1].mlp.up_proj.weight[zeros] == 0).all())


def test_a_model_in_hand(folder: Path, tmp_path: Path, calibrated: torch.nn.Module) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert hf_hyper.compress_model(model, hf_hyper.HyperConfig(**CALIBRATED)) is model
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(model(ids).logits, calibrated(ids).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, calibrated(ids).logits)
    with pytest.raises(ConfigError, match="compressed already"):
        hf_hyper.compress_model(model, hf_hyper.HyperConfig())


def test_windows_of_an_encoder_are_framed(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "once", "upon"]))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, intermediate_size=32))
    model.name_or_path = str(tmp_path)
    found = calibration_windows(model, ["once upon a " * 400], 1024, 0)
    assert found.shape == (4, 256)
    texts = found.split([128, 64, 32, 32], 1)
    assert all((text[:, 0] == 2).all() and (text[:, -1] == 3).all() for text in texts)
    bodies = torch.cat([text[:, 1:-1] for text in texts], 1)  # go on from text to text
    assert bodies[0, 0] == 6
    assert all(torch.equal(row, (torch.arange(248) + row[0] - 5) % 3 + 5) for row in bodies)
    with pytest.raises(ConfigError, match="calibration_tokens is 5, wanted room for text between"):
        calibration_windows(model, ["once upon a " * 400], 5, 0)
