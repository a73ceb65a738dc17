"""A model run layer by layer is the model, and the texts in a window of an encoder do not see each other."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LongformerConfig,
    LongformerModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from hf_hyper.errors import ConfigError
from hf_hyper.pipeline.stack import Stack, text_lengths

SIZES = {"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}


def small_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "bert":
        model: PreTrainedModel = BertModel(BertConfig(**SIZES))
    elif kind == "bert with a head":
        model = BertForMaskedLM(BertConfig(**SIZES))
    elif kind == "deberta":
        model = DebertaV2Model(DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"]))
    elif kind == "longformer":
        model = LongformerModel(LongformerConfig(**SIZES, attention_window=16))
    elif kind == "t5 encoder":
        model = T5EncoderModel(T5Config(vocab_size=60, d_model=48, d_ff=80, d_kv=12, num_layers=2, num_heads=4))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=48, n_layer=2, n_head=4))
    return model.eval().requires_grad_(False)


def test_lengths_of_texts() -> None:
    encoder, writer = small_model("bert"), small_model("gpt2")
    assert text_lengths(encoder, 256) == [128, 64, 32, 32]
    assert text_lengths(encoder, 129) == [65, 32, 32]
    assert text_lengths(encoder, 63) == [63]
    assert text_lengths(writer, 512) == [512]


@pytest.mark.parametrize("length", [20, 131])
@pytest.mark.parametrize("kind", ["bert", "bert with a head", "deberta", "longformer", "t5 encoder", "gpt2"])
def test_layer_by_layer_is_the_model(kind: str, length: int) -> None:
    model = small_model(kind)
    windows = torch.randint(60, (4, length))
    lengths = [length] if kind == "gpt2" or length == 20 else [66, 33, 32]
    wanted = torch.cat([model(input_ids=part)[0] for part in windows.split(lengths, 1)], 1)
    stack = Stack(model, windows, 2)
    assert (stack.entries.shape[1] > length) == (kind == "longformer")  # which fills texts up
    for place, states in stack.batches(stack.entries):
        for index in range(len(stack)):
            states = stack.run(index, states)
        for own, expected in zip(states, wanted[place], strict=True):
            output = stack.finish(own.unsqueeze(0))
            found = output["last_hidden_state" if "last_hidden_state" in output else "logits"]
            torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_gradients_stay_within_a_text() -> None:
    model = small_model("bert")
    stack = Stack(model, torch.randint(60, (2, 128)), 2)
    gradient = torch.zeros_like(stack.entries)
    gradient[:, 70] = torch.randn(2, 48)  # in the second text
    found = stack.backward(0, stack.entries, gradient)
    assert (found[:, 64:96].norm(dim=-1) > 0).all()
    assert not found[:, :64].any()
    assert not found[:, 96:].any()


class TextAware(nn.Module):
    """A layer that is told of the text besides its hidden states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, states: Tensor, *rest: Any, text: Tensor | None = None, **named: Any) -> Any:
        return self.layer(states, *rest, **named)


@pytest.mark.parametrize("length", [20, 131])
def test_layers_that_are_told_of_the_text_are_refused(length: int) -> None:
    model = small_model("bert")
    layers = model.encoder.layer
    layers[1] = TextAware(layers[1])
    layers[0] = TextAware(layers[0])
    told: list[Tensor] = []
    model.register_forward_pre_hook(lambda *call: told.append(call[2]["input_ids"]), with_kwargs=True)
    layers[1].register_forward_pre_hook(lambda _, args, named: (args, {**named, "text": told[-1]}), with_kwargs=True)
    with pytest.raises(ConfigError, match=r"layer encoder\.layer\.1 takes inputs that change with the text"):
        Stack(model, torch.randint(60, (4, length)), 2)


def test_outputs_without_a_row_for_every_token_are_refused() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    stack = Stack(model, torch.randint(60, (2, 64)), 1)
    with pytest.raises(ConfigError, match="BertForSequenceClassification returns neither logits nor a last hidden"):
        stack.finish(stack.entries[:1])
