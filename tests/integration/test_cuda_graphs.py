"""A compressed model on a CUDA device: compiled into graphs, without a wait in its forward pass, calibrated there."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import hf_hyper
from hf_hyper import HyperConfig
from hf_hyper.nn import HyperLinear
from hf_hyper.nn.replace import hyper_modules
from hf_hyper.pipeline.calibrate import compress_loaded
from hf_hyper.plan import plan_shape

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def small_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def small_mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def sums_in_any_order() -> Iterator[None]:
    """Models themselves use operations that CUDA cannot repeat."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture(params=["shift", "winding", "experts", "winding experts"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A compressed model, embeddings too."""
    plain = small_mixtral() if "experts" in request.param else small_llama()
    return compressed(plain, "winding" if "winding" in request.param else "shift")


def compressed(model: PreTrainedModel, hyperfunction: str) -> nn.Module:
    config = HyperConfig(bits=4, hyperfunction=hyperfunction, effort="fast", compress_embeddings=True)
    return hf_hyper.compress_module(model, config).to("cuda", torch.bfloat16)


def test_generate_with_static_cache_gives_the_tokens_of_eager(model: nn.Module) -> None:
    prompt = torch.arange(1, 9, device="cuda").unsqueeze(0)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)  # pyright: ignore
    for _ in range(2):
        again = model.generate(  # pyright: ignore[reportCallIssue]
            prompt, attention_mask=torch.ones_like(prompt), cache_implementation="static", **options
        )
        assert (again == eager).float().mean() > 0.9  # compiled attention may round a close choice the other way


def test_first_call_compiled_into_graphs(model: nn.Module) -> None:
    step = torch.compile(model, mode="reduce-overhead")
    tokens = torch.arange(1, 9, device="cuda").unsqueeze(0)
    with torch.inference_mode():
        for _ in range(3):
            step(tokens, use_cache=False)
        got = step(tokens, use_cache=False).logits.clone()
        wanted = model(tokens, use_cache=False).logits
    assert torch.allclose(got.float(), wanted.float(), atol=0.05 * float(wanted.abs().max()))


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_forward_does_not_wait(tokens: int, model: nn.Module) -> None:
    ids = torch.arange(tokens, device="cuda").unsqueeze(0) % 512
    calls: list[tuple[nn.Module, tuple[torch.Tensor, ...]]] = [(model.get_input_embeddings(), (ids,))]  # pyright: ignore
    for _, layer in hyper_modules(model):
        if isinstance(layer, nn.Embedding):
            continue
        rows = torch.randn(tokens, layer.scheme.in_features, device="cuda", dtype=torch.bfloat16)
        calls.append((layer, (rows,) if isinstance(layer, HyperLinear) else (rows, ids[0] % 4)))
    with torch.inference_mode():
        for layer, arguments in calls:
            layer(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for layer, arguments in calls:
                layer(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["matmul", "matmul_experts", "embedding", "decode"])
def test_operators_keep_the_rules_of_torch(name: str, model: nn.Module) -> None:
    for _, layer in hyper_modules(model):
        stored, key = layer.stored(), layer.scheme.key
        x = torch.randn(3, layer.scheme.in_features, device="cuda", dtype=torch.bfloat16)
        ids = torch.tensor([0, 3, 0], device="cuda")
        arguments = {
            "matmul": (x, stored, key),
            "matmul_experts": (x, ids, stored, key),
            "embedding": (ids, stored, key, torch.bfloat16),
            "decode": (stored, key, torch.bfloat16),
        }
        if (layer.layout.experts is not None) == (name == "matmul_experts"):
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(getattr(torch.ops.hf_hyper, name).default, arguments[name], test_utils=tests)
            return


@pytest.mark.parametrize("rounding", ["plain", "fit"])
def test_calibrated_there_as_well_as_on_the_cpu(rounding: str) -> None:
    model = small_llama()
    text = torch.randint(512, (8, 64))
    config = HyperConfig(bits=3, effort="best", calibration="default", rounding=rounding)
    plans = {
        name: plan
        for name, module in model.model.named_modules(prefix="model")
        if isinstance(module, nn.Linear)
        and (plan := plan_shape(config, (module.out_features, module.in_features), reshapable=False))
    }
    errors = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(model).to(device)  # pyright: ignore
        measured = compress_loaded(own, plans, text.to(device), "best", rounding=rounding)
        errors.append(torch.tensor([each["output_error"] for each in measured.values()]))
    assert torch.allclose(errors[0], errors[1], rtol=0.05)  # draws of tokens differ from device to device
