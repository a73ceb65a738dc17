"""What rounding is expected to cost: in nats a token, seen in some of the windows, with nothing changed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hf_hyper.config import HyperConfig
from hf_hyper.errors import ShapeError
from hf_hyper.eval.kl import token_divergence
from hf_hyper.pipeline import expected_losses as expected
from hf_hyper.pipeline.gradients import states_by_layer, top_gradients
from hf_hyper.pipeline.stack import Stack
from hf_hyper.plan import Plan, plan_shape
from hf_hyper.rounding import Knowledge
from hf_hyper.scheme import TensorScheme

BATCH = 2


class Text:
    """A small model, and hidden states and gradients of random windows in it."""

    def __init__(self, folder: Path, windows: int) -> None:
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=48, n_layer=2, n_head=4, n_positions=32)).eval()
        for parameter in self.model.requires_grad_(False).parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        self.ids = torch.randint(60, (windows, 32))
        self.stack = Stack(self.model, self.ids, BATCH)
        with torch.no_grad():
            self.states = states_by_layer(self.stack, folder)
        self.gradients = top_gradients(self.stack, self.states[-1], seed=0)

    def expected(self) -> dict[str, expected.ExpectedLoss]:
        """Losses of the feed-forward layers, whose weights lie transposed in the model."""
        layers = [
            {f"transformer.h.{i}.mlp.{name}": layer.mlp.get_submodule(name) for name in ("c_fc", "c_proj")}
            for i, layer in enumerate(self.model.transformer.h)
        ]
        shapes = {"c_fc": (192, 48), "c_proj": (48, 192)}
        plans: dict[str, Plan] = {}
        for name in [name for layer in layers for name in layer]:
            plan = plan_shape(HyperConfig(bits=3), shapes[name.rpartition(".")[2]], False)
            assert plan is not None
            plans[name] = plan
        return expected.expected_losses(self.stack, self.states, self.gradients, layers.__getitem__, plans)


class WhiteNoise:
    """In the place of `Sensitivity`: noise that is white in the weight itself, without feedback."""

    def __init__(self, weight: Tensor, scheme: TensorScheme, knowledge: Knowledge, *, name: str) -> None:
        assert knowledge.outputs is not None
        assert tuple(weight.shape) == (scheme.out_features, scheme.in_features)
        self.alone = self.among_others = 0.0

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        self.alone += float((gradient.float().mT @ rows.float()).square().sum())


@torch.no_grad()
def test_losses_are_nats_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """White noise costs what gradients of the weight, summed over windows, foretell."""
    monkeypatch.setattr(expected, "Sensitivity", WhiteNoise)
    monkeypatch.setattr(expected, "SHARE", 2)
    text = Text(tmp_path, windows=64)
    wanted = text.model(text.ids).logits.flatten(0, 1)
    for name, loss in text.expected().items():
        weight = text.model.get_submodule(name).weight
        kept, deviation, found = weight.clone(), 0.02, []
        for _ in range(4):
            weight.copy_(kept + deviation * torch.randn_like(kept))
            found.append(token_divergence(wanted, text.model(text.ids).logits.flatten(0, 1))[0].mean())
        weight.copy_(kept)
        # Four draws of 9216 numbers, most of them in few directions that matter: 10 %.
        assert float(torch.stack(found).mean()) == pytest.approx(deviation**2 * loss.alone, rel=0.2)


@pytest.mark.parametrize(
    ("windows", "known_by", "judged_by"),
    [
        (4, [0, 2], [1, 3]),
        (6, [0, 3], [1, 4]),
        (34, [0, 17], [8, 25]),
        (66, [0, 16, 33, 49], [8, 24, 41, 57]),
    ],
)
def test_windows_are_spread_over_the_text(
    windows: int, known_by: list[int], judged_by: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, seen = Text(tmp_path, windows), []

    def noted(whole):
        def note(stack, index, states, modules, gradients, *notes):
            seen.append((index, states.clone(), gradients.clone()))
            return whole(stack, index, states, modules, gradients, *notes)

        return note

    monkeypatch.setattr(expected, "layer_backward", noted(expected.layer_backward))
    monkeypatch.setattr(expected, "layer_gradients", noted(expected.layer_gradients))
    text.expected()
    assert [index for index, *_ in seen] == [1, 1, 0, 0]
    for (index, states, gradients), chosen in zip(seen, [known_by, judged_by] * 2, strict=True):
        assert torch.equal(states, text.states[index, chosen])
        assert index == 0 or torch.equal(gradients, text.gradients[chosen])


def test_gradients_that_are_not_finite(tmp_path: Path) -> None:
    text = Text(tmp_path, windows=4)
    text.gradients[1] = torch.nan
    with pytest.raises(ShapeError, match=r"transformer.h.1.mlp.c_proj: gradients .* are NaN or infinite"):
        text.expected()


def test_looking_changes_nothing(tmp_path: Path) -> None:
    text = Text(tmp_path, windows=2)  # all of them are looked at
    tensors = {"states": text.states, "gradients": text.gradients, **dict(text.model.named_parameters())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    losses = text.expected()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    assert text.expected() == losses
