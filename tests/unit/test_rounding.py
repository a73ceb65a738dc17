"""Rounding with feedback: factors, order of the tiles, scales, and moments that are no use."""

import pytest
import torch
from torch import Tensor

from hf_hyper import codec
from hf_hyper.encoders.shift import DISTORTION
from hf_hyper.errors import ConfigError, ShapeError
from hf_hyper.rounding import (
    ExpertKnowledge,
    ExpertMoments,
    Knowledge,
    Moment,
    Sensitivity,
    output_error,
    quantize_calibrated,
)
from hf_hyper.rounding.feedback import round_with_feedback
from hf_hyper.rounding.moments import block_factor, regularized, trust
from hf_hyper.rounding.scales import fit_scales
from hf_hyper.scheme import TensorScheme


def correlated(width: int, rows: int = 2000, seed: int = 0) -> Tensor:
    """Rows whose coordinates depend on each other, with a spectrum that falls as 1 / i²."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(7)))[0]
    return torch.randn(rows, width, generator=draw) / (1 + torch.arange(width)) @ basis


def moment(rows: Tensor) -> Moment:
    found = Moment(rows.shape[1])
    found.add(rows[: len(rows) // 2], 0)
    found.add(rows[len(rows) // 2 :], 1)
    return found


def to_grid(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """A stand-in for the encoder: rounding to a grid of 0.25."""
    codes = (tiles * 4).round()
    return codes[:, :3].int(), codes / 4


def damage(error: Tensor, inputs: Tensor, outputs: Tensor | None = None) -> float:
    moved = error @ inputs
    return float(((moved if outputs is None else outputs @ moved) * error).sum())


def test_block_factor_reproduces_the_moment() -> None:
    matrix = regularized(moment(correlated(64)).mean(), 0.01)
    factor = block_factor(matrix, 16)
    inverse = torch.linalg.inv(factor)
    diagonal = inverse @ matrix @ inverse.T
    blocks = torch.block_diag(*[diagonal[i : i + 16, i : i + 16] for i in range(0, 64, 16)])
    assert torch.allclose(diagonal, blocks, atol=1e-5)
    assert all(torch.allclose(factor[i : i + 16, i : i + 16], torch.eye(16), atol=1e-6) for i in range(0, 64, 16))
    assert factor.triu(16).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(16, 16), (48, 592), (32, 16), (16, 320)], ids=str)
def test_without_correlation_every_tile_is_rounded_by_itself(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(shape), torch.rand(shape[0]) + 0.5
    wanted = scale.unsqueeze(1) * (weight / scale.unsqueeze(1) * 4).round() / 4
    for outputs in (None, torch.eye(shape[0])):
        codes, values = round_with_feedback(weight, scale, to_grid, torch.eye(shape[1]), outputs)
        assert torch.equal(scale.unsqueeze(1) * values, wanted)
        tiles = values.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).transpose(1, 2).flatten(2)
        assert torch.equal(codes, (tiles[..., :3] * 4).int())


def test_both_orders_of_the_tiles_agree_where_outputs_are_independent() -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(48, 320), torch.ones(48)
    inputs = block_factor(regularized(moment(correlated(320)).mean(), 0.01), 16)
    columns = round_with_feedback(weight, scale, to_grid, inputs)
    diagonals = round_with_feedback(weight, scale, to_grid, inputs, torch.eye(48))
    # Sums are taken in another order, so a value near the middle of two steps may fall to either side.
    assert (columns[1] != diagonals[1]).float().mean() < 1e-3


def test_feedback_lowers_the_damage_it_knows_of() -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(64, 96), torch.ones(64)
    inputs = regularized(moment(correlated(96)).mean(), 0.01)
    outputs = regularized(moment(correlated(64, seed=1)).mean(), 0.01)
    plain = weight - to_grid(weight.reshape(-1, 256))[1].view(64, 96)
    one = weight - round_with_feedback(weight, scale, to_grid, block_factor(inputs, 16))[1]
    two = weight - round_with_feedback(weight, scale, to_grid, block_factor(inputs, 16), block_factor(outputs, 16))[1]
    assert damage(one, inputs) < 0.5 * damage(plain, inputs)
    assert damage(two, inputs, outputs) < 0.5 * damage(one, inputs, outputs)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_the_damage_of_rounding_is_foreseen(bits: int) -> None:
    """By text that the moments have not seen; tokens of a window are summed before they are squared."""
    torch.manual_seed(0)
    weight = torch.randn(96, 160) * (0.5 + torch.rand(96, 1))
    seen = [torch.randn(4000, width).cumsum(1) * 0.3 + torch.randn(4000, width) for width in (160, 96)]
    knowledge = Knowledge(*[moment(rows[:2000]) for rows in seen])
    x, g = (rows[2000:].view(200, 10, -1) for rows in seen)
    # Tokens of a window partly agree, as those that attention gathers do.
    x, g = (rows + 2 * rows.mean(1, keepdim=True) for rows in (x, g))
    found, foreseen = torch.zeros(2), torch.zeros(2)
    for seed in range(4):
        scheme = TensorScheme("shift", bits, 96, 160, seed=seed)
        error = weight - codec.dequantize(quantize_calibrated(weight, scheme, "balanced", knowledge), scheme)
        tokens = ((g @ error) * x).sum(-1)
        found += torch.stack([tokens.sum(1).square().sum(), tokens.square().sum()])
        for place, rows in enumerate([(x, g), (x.flatten(0, 1), g.flatten(0, 1))]):
            sensitivity = Sensitivity(weight, scheme, knowledge)
            sensitivity.add(*rows)
            foreseen[place] += sensitivity.alone * DISTORTION[bits]
    assert found[0] > 2 * found[1]
    assert foreseen.tolist() == pytest.approx(found.tolist(), rel=0.25)


def test_tokens_among_others_are_divided_by_their_gradients() -> None:
    torch.manual_seed(0)
    scheme = TensorScheme("shift", 3.0, 32, 48)
    x, g = torch.randn(6, 5, 48), torch.randn(6, 5, 32) * 5 * torch.rand(6, 5, 1).exp()
    g[0, 0] = 0  # the first token of a window, whose query has nothing to choose between
    # White moments and orthogonal rows: factors and rotations change no product of two tokens.
    white = Knowledge(*[moment(torch.cat([torch.eye(width)] * 2)) for width in (48, 32)])
    sensitivity = Sensitivity(torch.eye(32, 48), scheme, white)
    sensitivity.add(x[:4], g[:4])
    sensitivity.add(x[4:], g[4:])
    root = g.norm(dim=-1, keepdim=True).sqrt()
    divided = torch.where(root > 0, g / root, 0.0)
    assert root.square().mean() > 4
    alone, among = ((rows.mT @ x).square().sum() for rows in (g, divided))
    assert sensitivity.among_others / sensitivity.alone == pytest.approx(
        float(among / alone * root.square().mean()), rel=1e-3
    )


def test_sensitivity_is_a_sum_over_text_and_experts() -> None:
    torch.manual_seed(0)
    weight, scheme = torch.randn(2, 48, 32), TensorScheme("shift", 3.0, 48, 32)
    inputs, outputs = ExpertMoments(2, 32), ExpertMoments(2, 48)
    x, g, ids = torch.randn(600, 32), torch.randn(600, 48), torch.arange(600) % 3  # 2 is no expert
    for half in (0, 1):
        inputs.add(x[half::2], ids[half::2], half)
        outputs.add(g[half::2], ids[half::2], half)
    knowledge = ExpertKnowledge(inputs, outputs)
    bank = Sensitivity(weight, scheme, knowledge)
    bank.add(x[:300], g[:300], ids[:300])
    bank.add(x[300:], g[300:], ids[300:])
    alone = 0.0
    for expert, known in enumerate(knowledge.by_expert()):
        one = Sensitivity(weight[expert], scheme, known)
        one.add(x[ids == expert], g[ids == expert])
        alone += one.alone
    assert bank.alone == pytest.approx(alone, rel=1e-4)
    assert 0 < bank.among_others < bank.alone
    assert alone > 0


def test_rows_of_scale_zero_stay_zero() -> None:
    weight = torch.randn(32, 32)
    weight[3] = 0
    scale = torch.ones(32)
    scale[3] = 0
    _, values = round_with_feedback(weight, scale, to_grid, torch.eye(32), torch.eye(32))
    assert (values * scale.unsqueeze(1))[3].abs().max() == 0


@pytest.mark.parametrize("two_sided", [False, True])
def test_scales_are_the_best_ones(two_sided: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 32)
    values = weight + 0.3 * torch.randn(16, 32)
    inputs = regularized(moment(correlated(32)).mean(), 0.01)
    outputs = regularized(moment(correlated(16)).mean(), 0.01) if two_sided else None
    scale = fit_scales(weight, values, inputs, outputs)
    best = damage(weight - scale.unsqueeze(1) * values, inputs, outputs)
    for row in range(16):
        for step in (-0.02, 0.02):
            moved = scale.clone()
            moved[row] += step
            assert damage(weight - moved.unsqueeze(1) * values, inputs, outputs) > best


def test_trust_grows_with_the_text() -> None:
    strengths = [trust(moment(correlated(64, rows)).halves, 16) for rows in (8, 200, 20000)]
    assert strengths[0] > strengths[1] > strengths[2]


def test_rows_that_cannot_be_counted() -> None:
    with pytest.raises(ShapeError, match=r"width 3 .* width 4"):
        Moment(4).add(torch.zeros(2, 3), 0)
    with pytest.raises(ShapeError, match="NaN or infinite"):
        Moment(4).add(torch.full((2, 4), torch.inf), 0)


@pytest.mark.parametrize("rows", [0, 1, 5, 3000], ids=lambda rows: f"{rows}rows")
@pytest.mark.parametrize("factor", [1e-15, 1.0, 1e15], ids=["tiny", "unit", "huge"])
def test_any_moment_ends_in_a_good_weight(rows: int, factor: float) -> None:
    """Rank-deficient, empty, tiny and huge moments are at worst no help."""
    torch.manual_seed(0)
    scheme = TensorScheme("shift", 4.0, 50, 72)
    weight = torch.randn(50, 72)
    inputs, outputs = Moment(72), Moment(50)
    for half in range(2):
        inputs.add(factor * correlated(72, rows, half), half)
        outputs.add(factor * correlated(50, rows, half), half)
    tensors = quantize_calibrated(weight, scheme, "fast", Knowledge(inputs, outputs))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in codec.tensor_specs(scheme).items()
    }
    assert codec.relative_error(weight, codec.dequantize(tensors, scheme)) < 0.1


def test_calibration_keeps_the_outputs_closer() -> None:
    torch.manual_seed(0)
    scheme = TensorScheme("shift", 3.0, 96, 144)
    weight, seen, unseen = torch.randn(96, 144), moment(correlated(144)), moment(correlated(144, seed=5))
    plain = codec.dequantize(codec.quantize(weight, scheme, "fast"), scheme)
    rounded = codec.dequantize(quantize_calibrated(weight, scheme, "fast", Knowledge(seen)), scheme)
    assert output_error(weight, rounded, unseen) < 0.5 * output_error(weight, plain, unseen)


def test_winding_has_no_tiles_to_feed_errors_between() -> None:
    scheme = TensorScheme("winding", 6.5, 16, 16, incoherence=False)
    with pytest.raises(ConfigError, match="needs hyperfunction 'shift'"):
        quantize_calibrated(torch.randn(16, 16), scheme, "fast", Knowledge(Moment(16)))
