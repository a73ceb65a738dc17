"""`loss_max`: the fewest points that keep a bound, and weights that miss it."""

from pathlib import Path

import pytest
import torch
from helpers import decode_winding, winding_scheme
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_hyper import HyperConfig
from hf_hyper.encoders import encode
from hf_hyper.errors import ConfigError
from hf_hyper.hyperfunctions.winding import code_width
from hf_hyper.nn import HyperLayer
from hf_hyper.plan import plan_shape, plan_weight


@pytest.mark.parametrize("loss_max", [0.02, 0.005, 0.001])
def test_the_smallest_rate_that_keeps_the_loss_bound(trained: Tensor, loss_max: float):
    config = HyperConfig(bits=8, hyperfunction="winding", effort="fast", winding={"loss_max": loss_max})
    shape_plan = plan_shape(config, tuple(trained.shape), reshapable=False)
    assert shape_plan is not None
    plan = plan_weight(config, trained, shape_plan)
    losses = {}
    for width in range(3, 17):
        of = winding_scheme(*trained.shape, bits=width / 2)
        losses[width] = float((decode_winding(encode(trained, of, "fast"), of) - trained).abs().mean())
    if loss_max < losses[16]:
        assert plan is None
        return
    assert plan is not None
    assert losses[code_width(plan.scheme)] <= loss_max < losses[code_width(plan.scheme) - 1]


def test_weights_that_miss_the_loss_bound_stay(stories: Path, tmp_path: Path):
    config = HyperConfig(bits=5, hyperfunction="winding", effort="fast", winding={"loss_max": 0.004})
    model = AutoModelForCausalLM.from_pretrained(stories, quantization_config=config, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    kept, stored = [], []
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and name != "lm_head":
            kept.append(name)
            assert torch.equal(module.weight, original.get_submodule(name).weight)
        elif isinstance(module, HyperLayer):
            stored.append(name)
            assert (module.weight - original.get_submodule(name).weight).abs().mean() <= 0.004
    assert len(kept) + len(stored) == 35
    assert kept and stored
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.arange(3, 35)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_bound_that_no_weight_meets_is_an_error(stories: Path):
    config = HyperConfig(bits=2, hyperfunction="winding", effort="fast", winding={"loss_max": 1e-6})
    with pytest.raises(ConfigError, match="no weight meets loss_max 1e-06"):
        AutoModelForCausalLM.from_pretrained(stories, quantization_config=config, dtype=torch.float32)
