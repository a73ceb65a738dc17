"""A compressed model on a CUDA device: compiled into graphs, without a wait in its forward pass."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_hyper
from hf_hyper import HyperConfig
from hf_hyper.nn import HyperLinear

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


def compressed(model: nn.Module) -> nn.Module:
    config = HyperConfig(bits=4, effort="fast", compress_embeddings=True)
    return hf_hyper.compress_module(model, config).to("cuda", torch.bfloat16)


def test_generate_with_static_cache_gives_the_tokens_of_eager() -> None:
    model = compressed(small_llama())
    prompt = torch.arange(1, 9, device="cuda").unsqueeze(0)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)  # pyright: ignore
    for _ in range(2):
        again = model.generate(  # pyright: ignore[reportCallIssue]
            prompt, attention_mask=torch.ones_like(prompt), cache_implementation="static", **options
        )
        assert (again == eager).float().mean() > 0.9  # compiled attention may round a close choice the other way


def test_first_call_compiled_into_graphs() -> None:
    model = compressed(small_llama())
    step = torch.compile(model, mode="reduce-overhead")
    tokens = torch.arange(1, 9, device="cuda").unsqueeze(0)
    with torch.inference_mode():
        for _ in range(3):
            step(tokens, use_cache=False)
        got = step(tokens, use_cache=False).logits.clone()
        wanted = model(tokens, use_cache=False).logits
    assert torch.allclose(got.float(), wanted.float(), atol=0.05 * float(wanted.abs().max()))


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_forward_does_not_wait(tokens: int) -> None:
    model = compressed(small_llama())
    ids = torch.arange(tokens, device="cuda").unsqueeze(0) % 512
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(ids)  # pyright: ignore
        layers = [m for _, m in model.named_modules() if isinstance(m, HyperLinear)]
        inputs = [torch.randn(tokens, m.in_features, device="cuda", dtype=torch.bfloat16) for m in layers]
        for module, x in zip(layers, inputs, strict=True):
            module(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.get_input_embeddings()(ids)  # pyright: ignore
            for module, x in zip(layers, inputs, strict=True):
                module(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert embedded.shape == (1, tokens, 256)
