"""The off-grid twin computes what the model computes; the peers of the quality benchmark are what they claim to be."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hyper.bench import offgrid, quality
from hf_hyper.errors import ConfigError


@pytest.fixture(scope="module")
def model(stories):
    return AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs():
    return torch.randint(512, (2, 48), generator=torch.Generator().manual_seed(1))


# float32: five layers of rounding at 6e-8 on logits of order 10. float64: the norms of Llama compute in float32.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-5)], ids=["f32", "f64"])
@torch.no_grad()
def test_function_stays(model, inputs, dtype, tolerance):
    original = copy.deepcopy(model).to(dtype)
    twin = copy.deepcopy(original)
    offgrid.take_off_grid(twin, seed=0)
    torch.testing.assert_close(twin(inputs).logits, original(inputs).logits, rtol=0, atol=tolerance)


def test_every_linear_leaves_its_grid(model):
    """Weights set to multiples of 1/8 are multiples of it no more, and ratios stay in the range of two factors."""
    original = copy.deepcopy(model)
    with torch.no_grad():
        for linear in quality.decoder_linears(original).values():
            linear.weight.copy_(torch.where(linear.weight > 0, 0.125, -0.25))
    twin = copy.deepcopy(original)
    offgrid.take_off_grid(twin, seed=0)
    for name, linear in quality.decoder_linears(original).items():
        ratio = twin.get_submodule(name).weight / linear.weight
        assert ratio.min() > 0.8 / 1.25 - 1e-6, name
        assert ratio.max() < 1.25 / 0.8 + 1e-6, name
        assert ratio[0].std() > 0.05, name


def test_seed_decides(model):
    twins = [copy.deepcopy(model) for _ in range(3)]
    for twin, seed in zip(twins, (7, 7, 8), strict=True):
        offgrid.take_off_grid(twin, seed)
    first, same, other = (twin.model.layers[0].mlp.down_proj.weight for twin in twins)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@torch.no_grad()
def test_biases_move_with_their_rows(inputs):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    original = Qwen2ForCausalLM(config).eval()
    for layer in original.model.layers:
        torch.nn.init.normal_(layer.self_attn.v_proj.bias)
    twin = copy.deepcopy(original)
    offgrid.take_off_grid(twin, seed=0)
    torch.testing.assert_close(twin(inputs).logits, original(inputs).logits, rtol=0, atol=1e-4)


def test_unusable_requests(model):
    with pytest.raises(ConfigError, match=r"factors from 0 to 1 cannot be used"):
        offgrid.take_off_grid(model, 0, low=0, high=1)
    other = copy.deepcopy(model)
    other.config.model_type = "gemma"
    with pytest.raises(ConfigError, match=r"model type 'gemma' .* wanted one of llama"):
        offgrid.take_off_grid(other, 0)


def test_command_writes_a_folder_that_loads(stories, model, inputs, tmp_path, capsys):
    target = tmp_path / "twin"
    assert offgrid.main([str(target), "--source", str(stories), "--seed", "3"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]
    twin = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        torch.testing.assert_close(twin(inputs).logits, model(inputs).logits, rtol=0, atol=1e-4)
    assert (
        AutoTokenizer.from_pretrained(target)("Once").input_ids
        == AutoTokenizer.from_pretrained(stories)("Once").input_ids
    )
    assert offgrid.main([str(target), "--source", str(stories)]) == 1
    assert f"folder {target} exists" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_on_its_own_grid_is_exact(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (4, 128), generator=generator)
    codes[:, ::64], codes[:, 1::64] = 0, 2**bits - 1
    weight = (codes - 2 ** (bits - 1)) * 0.125
    decoded, stored = quality.round_to_nearest(weight, bits)
    torch.testing.assert_close(decoded, weight, rtol=0, atol=0)
    assert stored == weight.numel() * bits + 8 * (16 + bits)


def test_round_to_nearest_errs_by_half_a_step():
    weight = torch.randn(8, 172, generator=torch.Generator().manual_seed(0))
    decoded, stored = quality.round_to_nearest(weight, 4)
    for start in range(0, 172, 64):
        part = weight[:, start : start + 64]
        step = (part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)) / 15
        error = (decoded[:, start : start + 64] - part).abs().amax(1)
        # A whole step: the zero point is rounded too, and may cut the end of the range by half a step.
        assert bool((error <= 1.02 * step).all())
    assert stored == 8 * (172 * 4 + 3 * 20)


def test_round_to_nearest_of_zeros():
    decoded, _ = quality.round_to_nearest(torch.zeros(2, 64), 4)
    assert not decoded.any()


def test_quality_rows(stories, tmp_path, capsys):
    report = tmp_path / "rows.json"
    arguments = ["--model", str(stories), "--json", str(report), "--methods", "nf4", "nf4-dq", "rtn"]
    assert quality.main([*arguments, "--sequences", "2", "--seq-len", "64", "--bits", "4", "3"]) == 0
    rows = json.loads(report.read_text())
    assert [(row["method"], row["bits"]) for row in rows] == [("nf4", 4), ("nf4-dq", 4), ("rtn", 4), ("rtn", 3)]
    measured = [row for row in rows if "skipped" not in row]
    for row in measured:
        assert row["bits"] < row["bits_per_weight"] < row["bits"] + 0.8
        assert row["tokens"] == 2 * 63
        assert 0 < row["kl_mean"] <= row["kl_p99"] <= row["kl_max"]
    assert measured[-1]["kl_mean"] > measured[-2]["kl_mean"]
    assert "rtn" in capsys.readouterr().out


def test_peer_that_is_not_installed(stories, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows = list(quality.compare(stories, "Once upon a time there was a dog.", methods=["nf4"], sequences=1, seq_len=8))
    assert rows == [{"method": "nf4", "bits": 4, "skipped": "bitsandbytes is not installed"}]
    assert "skipped: bitsandbytes is not installed" in quality.format_table(rows)


def test_table_compares_at_equal_bits():
    def row(method, bits, kl):
        named = dict.fromkeys(["kl_p99", "kl_max", "top1", "ppl", "ref_ppl", "seconds", "bits_per_weight"], 1.0)
        return {"method": method, "bits": bits, "kl_mean": kl, **named}

    lines = quality.format_table([row("shift", 4, 0.2), row("rtn", 4, 0.4), row("rtn", 3, 1.0)]).splitlines()
    assert "0.500" in lines[2]
    assert "0.500" not in lines[1] + lines[3]


def test_unknown_method(stories):
    with pytest.raises(ConfigError, match="method 'magic' is unknown; choose from shift"):
        list(quality.compare(stories, "text", methods=["magic"]))
