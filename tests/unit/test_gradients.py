"""What calibration sees of modules while a layer runs."""

import torch
from torch import nn
from transformers import BertConfig, BertModel

from hf_hyper.pipeline.gradients import _Watch, layer_forward
from hf_hyper.pipeline.stack import Stack


def test_modules_share_a_moment_where_they_share_all_inputs() -> None:
    modules = {name: nn.Linear(4, 4) for name in ("query", "key", "value", "position")}
    watch = _Watch(modules)
    for rows in (3, 5):
        states, positions = torch.randn(2, rows, 4), torch.randn(6, 4)
        with watch.forward():
            for name in ("query", "key", "value"):
                modules[name](states)
            modules["key"](positions)
    known = watch.knowledge()
    assert {name: found.inputs.counts for name, found in known.items()} == {
        "query": [16, 0],
        "key": [28, 0],
        "value": [16, 0],
    }
    assert known["query"].inputs is known["value"].inputs


def test_outputs_that_the_loss_does_not_move_are_passed_over() -> None:
    module, states = nn.Linear(4, 4).requires_grad_(False), torch.randn(3, 4, requires_grad=True)
    watch = _Watch({"key": module})
    with watch.backward():
        (module(states) @ module(torch.randn(6, 4)).T).sum().backward()
    (known,) = watch.knowledge().values()
    assert known.inputs.counts == [3, 0]
    assert known.outputs.counts == [3, 0]


def test_inputs_are_watched_before_outputs_take_their_place() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    stack = Stack(BertModel(BertConfig(**sizes, intermediate_size=16)).eval(), torch.randint(20, (4, 65)), 2)
    query = stack.layers[0].attention.self.query  # is given the hidden states themselves, with no norm between
    states = stack.entries.clone()
    layer_known = layer_forward(stack, 0, states, {"query": query}, states)
    assert layer_known["query"].inputs.counts == [130, 130]
    rows = stack.entries.flatten(0, 1)
    torch.testing.assert_close(layer_known["query"].inputs.mean(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
    assert not torch.equal(states, stack.entries)
