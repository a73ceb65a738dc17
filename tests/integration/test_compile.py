"""`torch.compile` of compressed layers and models: one graph, the same numbers."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_hyper import HyperConfig
from hf_hyper.nn.linear import HyperLinear
from hf_hyper.scheme import TensorScheme

STORIES = Path(__file__).parent.parent / "data" / "stories260K"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(STORIES, quantization_config=HyperConfig(bits=4, effort="fast")).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_layer_is_one_graph(dtype: torch.dtype) -> None:
    layer = HyperLinear.from_weight(torch.randn(48, 100), TensorScheme("shift", 4.0, 48, 100), torch.randn(48))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (1, 2, 40):
        x = torch.randn(count, 100, dtype=dtype)
        assert torch.equal(compiled(x), layer(x))


def test_gradient_through_a_compiled_layer() -> None:
    layer = HyperLinear.from_weight(torch.randn(48, 100), TensorScheme("shift", 4.0, 48, 100))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 100, requires_grad=True)
    compiled(x).square().sum().backward()
    found, x.grad = x.grad, None
    layer(x).square().sum().backward()
    assert found is not None
    assert x.grad is not None
    assert torch.allclose(found, x.grad, rtol=1e-5, atol=1e-5)


def test_model_has_no_graph_break(model: PreTrainedModel) -> None:
    ids = torch.tensor([[1, 403, 407, 261]])
    explained = torch._dynamo.explain(lambda ids: model(ids, use_cache=False).logits)(ids)
    assert explained.graph_break_count == 0, explained.break_reasons
    operators = [
        str(node.target) for graph in explained.graphs for node in graph.graph.nodes if node.op == "call_function"
    ]
    assert sum("hf_hyper.matmul" in name for name in operators) == len(hf_hyper_layers(model))


def test_generate_with_a_static_cache(model: PreTrainedModel) -> None:
    ids = torch.tensor([[1, 403, 407, 261]])
    mask = torch.ones_like(ids)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    static = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert torch.equal(plain, static)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for the code that inductor writes")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of inductor's own imports
def test_inductor_generates_with_a_static_cache(model: PreTrainedModel) -> None:
    ids = torch.tensor([[1, 403, 407, 261]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **options)
    eager = model.forward
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.forward = torch.compile(eager, fullgraph=True)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with torch.inference_mode():
            compiled = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    finally:
        model.forward = eager  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(plain, compiled)
    assert torch._dynamo.utils.counters["inductor"], "nothing was compiled"
    assert not torch._dynamo.utils.counters["graph_break"]


def hf_hyper_layers(model: PreTrainedModel) -> list[HyperLinear]:
    return [module for module in model.modules() if isinstance(module, HyperLinear)]


def test_the_quantizer_says_so(model: PreTrainedModel) -> None:
    assert model.hf_quantizer is not None
    assert model.hf_quantizer.is_compileable
