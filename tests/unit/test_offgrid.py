"""The off-grid twin computes what the model computes."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hyper.bench import offgrid
from hf_hyper.bench.quality_methods import decoder_linears
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
        for linear in decoder_linears(original).values():
            linear.weight.copy_(torch.where(linear.weight > 0, 0.125, -0.25))
    twin = copy.deepcopy(original)
    offgrid.take_off_grid(twin, seed=0)
    for name, linear in decoder_linears(original).items():
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
