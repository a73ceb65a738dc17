"""A model run layer by layer is the model, and the texts in a window of an encoder do not see each other."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from hf_hyper.pipeline.stack import Stack, pieces

SIZES = {"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}


def small_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "bert":
        model: PreTrainedModel = BertModel(BertConfig(**SIZES))
    elif kind == "bert with a head":
        model = BertForMaskedLM(BertConfig(**SIZES))
    elif kind == "deberta":
        model = DebertaV2Model(DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"]))
    elif kind == "t5 encoder":
        model = T5EncoderModel(T5Config(vocab_size=60, d_model=48, d_ff=80, d_kv=12, num_layers=2, num_heads=4))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=48, n_layer=2, n_head=4))
    return model.eval().requires_grad_(False)


def test_pieces() -> None:
    encoder, writer = small_model("bert"), small_model("gpt2")
    assert pieces(encoder, 256) == [128, 64, 32, 32]
    assert pieces(encoder, 129) == [65, 32, 32]
    assert pieces(encoder, 63) == [63]
    assert pieces(writer, 512) == [512]


@pytest.mark.parametrize("kind", ["bert", "bert with a head", "deberta", "t5 encoder", "gpt2"])
def test_layer_by_layer_is_the_model(kind: str) -> None:
    model = small_model(kind)
    windows = torch.randint(60, (4, 128))
    lengths = [128] if kind == "gpt2" else [64, 32, 32]
    wanted = torch.cat([model(input_ids=part)[0] for part in windows.split(lengths, 1)], 1)
    stack = Stack(model, windows, 2)
    for place, states in stack.batches(stack.entries):
        for index in range(len(stack)):
            states = stack.run(index, states)
        for own, expected in zip(states, wanted[place], strict=True):
            output = stack.finish(own.unsqueeze(0))
            found = output["last_hidden_state" if "last_hidden_state" in output else "logits"]
            torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_gradients_stay_within_a_piece() -> None:
    model = small_model("bert")
    stack = Stack(model, torch.randint(60, (2, 128)), 2)
    gradient = torch.zeros_like(stack.entries)
    gradient[:, 70] = torch.randn(2, 48)  # in the second piece
    found = stack.backward(0, stack.entries, gradient)
    assert (found[:, 64:96].norm(dim=-1) > 0).all()
    assert not found[:, :64].any()
    assert not found[:, 96:].any()
