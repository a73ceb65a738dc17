"""Fitting row scales to the loss: gradients against differences, less divergence on text that was not seen."""

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import hf_hyper
from hf_hyper.errors import ShapeError
from hf_hyper.nn import HyperExpertBank, HyperLinear
from hf_hyper.nn.replace import hyper_modules
from hf_hyper.pipeline import fit
from hf_hyper.pipeline.calibrate import compress_loaded
from hf_hyper.pipeline.stack import Stack
from hf_hyper.plan import plan_shape


def small_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        sizes = {"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = BertModel(BertConfig(**sizes, intermediate_size=80))
    elif kind == "mixtral":  # every expert is chosen, so that the loss is smooth
        sizes = {"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        experts = {"num_local_experts": 3, "num_experts_per_tok": 3}
        model = MixtralForCausalLM(MixtralConfig(**sizes, **experts, intermediate_size=80, num_key_value_heads=4))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=48, n_layer=2, n_head=4, n_positions=32))
    for parameter in model.parameters():  # biases that are not zero, attention that is not flat
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def last_states(model: torch.nn.Module, ids: Tensor) -> Tensor:
    stack = Stack(model, ids, 2)
    batches = []
    for _, states in stack.batches(stack.entries):
        for index in range(len(stack)):
            states = stack.run(index, states)
        batches.append(states)
    return torch.cat(batches)


def compressed(kind: str, ids: Tensor) -> tuple[torch.nn.Module, list[HyperLinear], Tensor]:
    model = small_model(kind)
    wanted = last_states(model, ids)
    hf_hyper.compress_model(model, hf_hyper.HyperConfig(bits=2, effort="fast"))
    return model, [layer for _, layer in hyper_modules(model) if fit.can_fit(layer)], wanted


@pytest.mark.parametrize(("kind", "length"), [("bert", 16), ("bert", 65), ("gpt2", 16), ("mixtral", 16)])
def test_gradients_are_those_of_the_divergence(kind: str, length: int) -> None:
    ids = torch.randint(60, (2, length), generator=torch.Generator().manual_seed(1))
    model, layers, wanted = compressed(kind, ids)
    stack = Stack(model, ids, 2)
    scales = [fit._Scales(layer) for layer in layers]
    with torch.no_grad():
        fit._backward(stack, scales, stack.entries, wanted, {})
    reached = [each for each in scales if each.logs[0].grad is not None]
    assert len(scales) - len(reached) == (kind == "bert")  # the pooler comes after the last hidden states
    for each in reached[::3] if kind != "mixtral" else reached[4::6] + reached[5::6]:  # banks of experts
        for name, log in zip(("scale", "out_scale"), each.logs, strict=True):
            place, parameter = int(log.grad.abs().argmax()), each.layer.get_parameter(name)
            kept, losses, steps = parameter.detach().clone(), [], []
            for factor in (1.05, 0.95):
                moved = kept.float()
                moved.view(-1)[place] *= factor
                parameter.data.copy_(moved)
                losses.append(fit._divergence(stack, last_states(model, ids), wanted, {})[0])
                steps.append(float(parameter.view(-1)[place]) / float(kept.view(-1)[place]))  # left of it in 16 bits
            parameter.data.copy_(kept)
            slope = (losses[0] - losses[1]) / (steps[0] - steps[1])
            assert slope == pytest.approx(float(log.grad.view(-1)[place]), rel=0.03)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_what_was_not_seen_gets_closer_too(kind: str) -> None:
    draw = torch.Generator().manual_seed(2)
    seen, unseen = torch.randint(60, (2, 64, 32), generator=draw)
    model, layers, wanted = compressed(kind, seen)
    reference = last_states(small_model(kind), unseen)

    @torch.no_grad()
    def loss() -> float:
        return fit._divergence(Stack(model, unseen, 2), last_states(model, unseen), reference, {})[0]

    before, codes = loss(), [layer.codes.clone() for layer in layers]
    losses = fit.fit_scales_to_loss(model, layers, seen, wanted, 4, seed=0)
    assert losses[-1] < losses[0]
    assert loss() < 0.97 * before
    assert all(torch.equal(layer.codes, code) for layer, code in zip(layers, codes, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_heads_and_embeddings_are_fitted_with_the_layers() -> None:
    draw = torch.Generator().manual_seed(5)
    seen, unseen = torch.randint(60, (2, 64, 32), generator=draw)
    sizes = {"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

    def model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        net = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=80, tie_word_embeddings=False)).eval()
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return net.requires_grad_(False)

    @torch.no_grad()
    def divergence(net: LlamaForCausalLM) -> float:
        wanted = model()(unseen).logits.log_softmax(-1)
        return float((wanted.exp() * (wanted - net(unseen).logits.log_softmax(-1))).sum(-1).mean())

    config = hf_hyper.HyperConfig(bits=2, effort="fast", modules_to_not_convert=[], compress_embeddings=True)
    found, heads = {}, {}
    for rounding in ("fisher", "fit"):
        net = model()
        plans = {
            name: plan_shape(config, tuple(module.weight.shape), False)
            for name, module in net.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        }
        compress_loaded(net, plans, seen, "best", rounding=rounding)
        assert isinstance(net.lm_head, HyperLinear)
        found[rounding], heads[rounding] = divergence(net), net.lm_head
    assert torch.equal(heads["fit"].codes, heads["fisher"].codes)
    assert not torch.equal(heads["fit"].out_scale, heads["fisher"].out_scale)
    assert found["fit"] < 0.97 * found["fisher"]


def test_rows_of_zeros_stay_zero() -> None:
    model = small_model("gpt2")
    model.transformer.h[0].mlp.c_fc.weight[:, 5] = 0  # [in_features, out_features]
    ids = torch.randint(60, (4, 16), generator=torch.Generator().manual_seed(3))
    wanted = last_states(model, ids)
    hf_hyper.compress_model(model, hf_hyper.HyperConfig(bits=2, effort="fast"))
    layer = model.transformer.h[0].mlp.c_fc
    fit.fit_scales_to_loss(model, [layer], ids, wanted, 1, seed=0)
    assert layer.dequantize()[5].abs().max() == 0
    assert layer.out_scale.isfinite().all()


def test_a_divergence_that_is_no_number_ends_the_fit() -> None:
    ids = torch.randint(60, (4, 16), generator=torch.Generator().manual_seed(4))
    model, layers, wanted = compressed("gpt2", ids)
    before = [layer.scale.clone() for layer in layers]
    wanted[2, 3] = torch.nan
    with pytest.raises(ShapeError, match=r"divergence .* is not finite in step 1 of 1 .* rounding='fisher'"):
        fit.fit_scales_to_loss(model, layers, ids, wanted, 1, seed=0)
    assert all(torch.equal(layer.scale, scale) for layer, scale in zip(layers, before, strict=True))


def test_a_gradient_that_is_no_number_ends_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(60, (4, 16), generator=torch.Generator().manual_seed(4))
    model, layers, wanted = compressed("gpt2", ids)
    before = [layer.scale.clone() for layer in layers]
    # What a backward pass in float16 may do while the divergence itself fits.
    monkeypatch.setattr(fit, "_divergence", lambda _, states, *__: (1.0, torch.full_like(states, torch.inf)))
    with pytest.raises(ShapeError, match=r"gradient of the divergence .* is not finite in step 1 of 1"):
        fit.fit_scales_to_loss(model, layers, ids, wanted, 1, seed=0)
    assert all(torch.equal(layer.scale, scale) for layer, scale in zip(layers, before, strict=True))


def test_rows_that_no_expert_gets_do_not_count() -> None:
    _, layers, _ = compressed("mixtral", torch.zeros(2, 16, dtype=torch.long))
    bank = next(layer for layer in layers if isinstance(layer, HyperExpertBank))
    gradients = []
    for routes in ([0, 2, 1], [0, 2, 1, 3, -1]):
        scales = fit._Scales(bank)
        handle = scales.watch()
        rows = torch.linspace(-1, 1, 48).repeat(len(routes), 1).requires_grad_(True)
        bank(rows, torch.tensor(routes)).square().sum().backward()
        handle.remove()
        gradients.append([log.grad for log in scales.logs])
    assert all(torch.allclose(one, other) for one, other in zip(*gradients, strict=True))


def test_steps_that_do_harm_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "STEP", 2.0)
    monkeypatch.setattr(fit, "BATCH_TOKENS", 128)
    ids = torch.randint(60, (64, 32), generator=torch.Generator().manual_seed(2))
    model, layers, wanted = compressed("gpt2", ids)
    before = [layer.get_parameter(name).clone() for layer in layers for name in ("scale", "out_scale")]
    losses = fit.fit_scales_to_loss(model, layers, ids, wanted, 4, seed=0)
    assert losses[-1] > losses[0]
    after = [layer.get_parameter(name) for layer in layers for name in ("scale", "out_scale")]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_what_says_how_far_to_go_is_not_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "BATCH_TOKENS", 32)
    learned, judged = [], []
    backward, loss = fit._backward, fit._loss
    monkeypatch.setattr(fit, "_backward", lambda *a: learned.append(a[2].sum().item()) or backward(*a))
    monkeypatch.setattr(fit, "_loss", lambda *a: judged.append(a[1].sum().item()) or loss(*a))
    ids = torch.randint(60, (16, 32), generator=torch.Generator().manual_seed(3))
    model, layers, wanted = compressed("gpt2", ids)
    fit.fit_scales_to_loss(model, layers, ids, wanted, 2, seed=0)
    assert len(set(learned)) == 14 and len(learned) == 28
    assert len(set(judged)) == 2 and len(judged) == 2 * len(fit.SHARES)
    assert not set(learned) & set(judged)
