"""What calibration sees of modules while a layer runs."""

import torch
from torch import nn

from hf_hyper.pipeline.gradients import _Watch


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
