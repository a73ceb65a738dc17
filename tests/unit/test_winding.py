"""`winding`: rates and options, encoder, loss bound."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import winding_scheme
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_hyper import HyperConfig, _native, codec, hyperfunctions
from hf_hyper.encoders import EFFORTS, encode
from hf_hyper.encoders.halving import nearest_brute_force
from hf_hyper.encoders.nearest import assign, shells
from hf_hyper.errors import ConfigError
from hf_hyper.hyperfunctions.winding import DIRECTIONS, WindingOptions, code_width, nodes
from hf_hyper.nn import HyperLayer
from hf_hyper.packing import unpack
from hf_hyper.plan import plan_shape, plan_weight
from hf_hyper.scheme import TensorScheme

CPU = torch.device("cpu")
PAPER = {"num_points": 1600, "num_shells": 3, "box_side": 0.1, "direction": "lattice"}


def decode(tensors: dict[str, Tensor], of: TensorScheme) -> Tensor:
    return hyperfunctions.get("winding").decode(tensors, of)


def codes_of(tensors: dict[str, Tensor], of: TensorScheme) -> Tensor:
    return unpack(tensors["codes"], code_width(of), -(-of.in_features // 2))


@pytest.fixture(scope="module")
def trained(stories: Path) -> Tensor:
    """A trained feed-forward matrix, `[172, 64]`."""
    return load_file(stories / "model.safetensors")["model.layers.2.mlp.gate_proj.weight"].float()


# Rates and options


def test_paper_settings_are_6_5_bits_per_weight():
    of = winding_scheme(64, 4096, bits=4, **PAPER)
    assert of.bits == 6.5
    assert code_width(of) == 13 == ((3 + 1) * (1600 + 1) - 1).bit_length()
    specs = hyperfunctions.get("winding").tensors(of)
    assert 8 * specs["codes"].num_bytes == 64 * 4096 * 6.5
    assert {name: spec.shape for name, spec in specs.items()} == {
        "codes": (64, 832),
        "centre": (2,),
        "shell_side": (4,),
    }


@pytest.mark.parametrize(("bits", "rate"), [(1.5, 1.5), (2, 2.0), (3.25, 3.5), (4, 4.0), (6.5, 6.5), (7.9, 8.0)])
def test_num_points_is_the_largest_that_fits(bits: float, rate: float):
    of = winding_scheme(bits=bits)
    points = of.option("num_points")
    assert of.bits == rate
    assert 4 * (points + 1) <= 2 ** (2 * rate) < 4 * (points + 2)


def test_scheme_survives_its_key():
    of = winding_scheme(bits=3, box_side=0.05)
    assert TensorScheme.parse(of.key) == of
    assert of.option("box_side") == 50_000_000


@pytest.mark.parametrize(
    ("bits", "options", "match"),
    [
        (1, {}, r"bits >= 1\.5 or num_shells <= 1"),
        (4, {"num_points": 2**23}, "num_points <= 4194303"),
        (4, {"num_shells": 0}, "num_shells is 0"),
        (4, {"num_points": 0}, "num_points is 0"),
        (4, {"box_side": -1.0}, "box_side is -1.0"),
        (4, {"direction": "platinum"}, "'hexagonal', 'lattice', 'plastic'"),
        (4, {"points": 3}, r"no option \['points'\]"),
    ],
)
def test_impossible_settings_say_what_would_fit(bits: float, options: dict[str, object], match: str):
    with pytest.raises(ConfigError, match=match):
        hyperfunctions.get("winding").resolve(bits, options)


def test_smallest_rate_works_with_one_shell():
    of = winding_scheme(bits=1, num_shells=1)
    assert (of.bits, of.option("num_points")) == (1.0, 1)
    assert decode(encode(torch.randn(16, 16), of), of).isfinite().all()


def test_codes_that_do_not_fit_the_rate_are_refused():
    of = winding_scheme(bits=4)
    wrong = TensorScheme("winding", 3.5, 16, 16, incoherence=False, options=of.options)
    with pytest.raises(ConfigError, match=r"256 codes of 2 weights, which 3\.5 bits"):
        hyperfunctions.get("winding").tensors(wrong)


def test_defaults_are_those_of_the_options_class():
    given = {name: getattr(WindingOptions(), name) for name in ("num_shells", "direction", "box_side")}
    assert winding_scheme(bits=4) == winding_scheme(bits=4, **given)


# Encoder


def paper_reference(weight: Tensor, of: TensorScheme) -> tuple[Tensor, Tensor]:
    """Code and node distance of every pair, by the released code's steps in float64 with a KD-tree."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    shells_count, side, unit = of.option("num_shells"), 0.1, nodes(of, CPU).double().numpy()
    pairs = weight.double().numpy().reshape(-1, 2)
    pairs = pairs - pairs.mean(0).astype(np.float32)
    distance = np.linalg.norm(pairs, axis=1)
    steps = side / 2 + np.arange(shells_count + 1) * (distance.max() - side / 2) / shells_count
    steps[-1] = distance.max()
    shell = np.argmax(distance[:, None] <= steps, axis=1)
    shell[np.abs(pairs).max(1) <= side / 2] = 0
    scaled = pairs / (2 * steps[shell])[:, None]
    found, index = neighbors.KDTree(unit, leaf_size=100).query(scaled, k=1)
    return torch.from_numpy(shell * len(unit) + index[:, 0]), torch.from_numpy(found[:, 0])


def test_paper_settings_give_the_index_of_brute_force_on_every_pair(trained: Tensor):
    of = winding_scheme(*trained.shape, **PAPER)
    tensors = encode(trained, of, "fast")
    codes, unit = codes_of(tensors, of).flatten(), nodes(of, CPU)
    shell = codes // len(unit)
    points = trained.double().view(-1, 2) - tensors["centre"].double()
    scaled = (points / tensors["shell_side"].double()[shell].unsqueeze(1)).float()
    assert shell.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(codes % len(unit), nearest_brute_force(scaled, unit).long())


def test_paper_settings_agree_with_a_kd_tree_in_float64(trained: Tensor):
    of = winding_scheme(*trained.shape, **PAPER)
    tensors = encode(trained, of, "fast")
    codes, unit = codes_of(tensors, of).flatten(), nodes(of, CPU)
    wanted, distance = paper_reference(trained, of)
    shell = codes // len(unit)
    assert torch.equal(shell, wanted // len(unit))
    points = trained.double().view(-1, 2) - tensors["centre"].double()
    scaled = points / tensors["shell_side"].double()[shell].unsqueeze(1)
    ours = (scaled - unit.double()[codes % len(unit)]).norm(dim=1)
    torch.testing.assert_close(ours, distance, rtol=0, atol=1e-7)  # float32 steps of a coordinate up to one half
    assert (codes == wanted).double().mean() > 0.999  # the rest are ties within float32


@pytest.mark.parametrize("bits", [2, 4, 6.5])
def test_balanced_takes_the_nearest_of_all_codes(trained: Tensor, bits: float):
    of = winding_scheme(*trained.shape, bits=bits)
    tensors = encode(trained, of)
    side, unit = tensors["shell_side"].double(), nodes(of, CPU)
    everything = ((side / side[-1]).float().view(-1, 1, 1) * unit).flatten(0, 1)
    points = (trained.double().view(-1, 2) - tensors["centre"].double()) / side[-1]
    assert torch.equal(codes_of(tensors, of).flatten(), nearest_brute_force(points.float(), everything).long())


def test_more_effort_and_more_bits_lower_the_error(trained: Tensor):
    def error(bits: float, effort: str) -> float:
        of = winding_scheme(*trained.shape, bits=bits)
        return float((decode(encode(trained, of, effort), of) - trained).square().mean())

    by_effort = [error(4, effort) for effort in EFFORTS]
    assert by_effort[1] < 0.9 * by_effort[0]
    assert by_effort[2] <= by_effort[1]
    assert error(3, "balanced") > by_effort[1] > error(5, "balanced") > error(6, "balanced")


@pytest.mark.parametrize("effort", EFFORTS)
def test_weights_on_codes_are_kept(effort: str):
    """decode(encode(p)) = p for the points of the box, and of the shells beyond it."""
    of = winding_scheme(bits=5)
    side = torch.tensor([1.0, 2.0, 3.0, 4.0])
    unit = nodes(of, CPU)
    points = (side.view(-1, 1, 1) * unit).double()
    distance, box = points.norm(dim=2), points.abs().amax(2)
    beyond = torch.cat([torch.zeros(1), side[:-1]]).view(-1, 1) / 2
    own = (distance > beyond) & (distance <= side.view(-1, 1) / 2) & ((box > 0.5) | (side == 1).view(-1, 1))
    kept = points[own]
    codes = assign(kept, side, of, effort)
    decoded = side[codes // len(unit)].unsqueeze(1) * unit[codes % len(unit)]
    assert len(kept) > 2 * len(unit)
    torch.testing.assert_close(decoded.double(), kept, rtol=0, atol=1e-6)  # float32 at magnitudes up to 2


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.zeros(4, 6), id="zeros"),
        pytest.param(torch.full((4, 6), 0.1), id="constant"),
        pytest.param(torch.tensor([[3.0]]), id="one weight"),
        pytest.param(torch.tensor([[3.0, -2.0, 1.0]]), id="one row"),
        pytest.param(torch.tensor([[3.0], [-2.0], [1.0]]), id="one column"),
        pytest.param(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 1e30, id="huge"),
        pytest.param(torch.tensor([[3.4e38, -3.4e38], [3.4e38, 3.4e38]]), id="largest"),
        pytest.param(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 1e-41, id="subnormal"),
        pytest.param(torch.eye(8) * 1e-45, id="smallest"),
        pytest.param(torch.eye(64) * 1e6, id="outliers"),
        pytest.param(torch.rand(8, 7, generator=torch.Generator().manual_seed(0)) - 0.5, id="nothing outside"),
    ],
)
def test_degenerate_tensors(weight: Tensor, effort: str):
    of = winding_scheme(*weight.shape, bits=6.5)
    tensors = encode(weight, of, effort)
    specs = hyperfunctions.get("winding").tensors(of)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    decoded = decode(tensors, of)
    assert decoded.isfinite().all()
    # 2047 points in a box of side 4 * largest are 0.1 * largest apart; the largest float32 saturate at half.
    room = 0.11 * float(weight.double().abs().max()) + 2.0**-148
    if weight.abs().max() < 1e38:
        assert (decoded.double() - weight).abs().max() <= room


@pytest.mark.parametrize("value", [0.0, 0.1, -3e30])
def test_constant_tensors_are_exact(value: float):
    of = winding_scheme(5, 9)
    weight = torch.full((5, 9), value)
    assert torch.equal(decode(encode(weight, of), of), weight)


@pytest.mark.parametrize("columns", [1, 2, 3, 17, 33])
def test_rows_decode_alone_at_any_width(columns: int):
    of = winding_scheme(6, columns, bits=4.5)
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(columns))
    tensors = encode(weight, of)
    decoded = decode(tensors, of)
    assert decoded.shape == weight.shape
    for row in range(6):
        assert torch.equal(decode({**tensors, "codes": tensors["codes"][row : row + 1]}, of)[0], decoded[row])


def test_incoherence_stores_the_padded_matrix():
    rate, constants = hyperfunctions.get("winding").resolve(4, {})
    of = TensorScheme("winding", rate, 30, 20, incoherence=True, options=constants)
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    tensors = encode(weight, of)
    assert tensors["codes"].shape == (32, 4)
    assert float((decode(tensors, of) - weight).square().mean()) < 0.02


def test_a_fixed_box_side_is_kept(trained: Tensor):
    of = winding_scheme(*trained.shape, bits=5, box_side=0.25)
    for effort in EFFORTS:
        assert float(encode(trained, of, effort)["shell_side"][0]) == 0.25


def test_large_matrices_are_encoded_in_blocks(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(40, 31, generator=torch.Generator().manual_seed(3))
    of = winding_scheme(40, 31)
    whole = encode(weight, of)
    monkeypatch.setattr("hf_hyper.encoders.nearest._BLOCK", 64)
    assert all(torch.equal(encode(weight, of)[name], whole[name]) for name in whole)


def test_shells_hold_every_point():
    of = winding_scheme(bits=4)
    sample = torch.randn(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    side = shells(sample, 20.0, torch.zeros(2), of, "balanced")
    assert float(side[-1]) == 40.0
    assert (side.diff() > 0).all()


def test_bit_patterns_beyond_the_last_code_decode_finite():
    of = winding_scheme(4, 8, **PAPER)
    tensors = encode(torch.randn(4, 8), of)
    assert decode({**tensors, "codes": torch.full_like(tensors["codes"], -1)}, of).isfinite().all()


def test_without_the_core_the_tensors_are_the_same(monkeypatch: pytest.MonkeyPatch, trained: Tensor):
    of = winding_scheme(*trained.shape, bits=4)
    fast = encode(trained, of)
    monkeypatch.setattr(_native, "load", lambda: None)
    monkeypatch.setattr(_native, "say_if_absent", lambda: None)
    slow = encode(trained, of)
    assert all(torch.equal(fast[name], slow[name]) for name in fast)


# Other numbers of weights to a point, scales, and the loss bound


@pytest.mark.parametrize("direction_name", DIRECTIONS)
@pytest.mark.parametrize("together", [1, 3, 4])
def test_other_dimensions(together: int, direction_name: str, trained: Tensor):
    weight = trained[:40, :61]
    of = winding_scheme(*weight.shape, bits=12 / together, dimension=together, direction=direction_name)
    assert TensorScheme.parse(of.key) == of
    assert code_width(of) == 12
    tensors = encode(weight, of)
    assert tensors["centre"].shape == (together,)
    specs = hyperfunctions.get("winding").tensors(of)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {name: spec.shape for name, spec in specs.items()}
    decoded = decode(tensors, of)
    assert float((decoded - weight).square().mean() / weight.square().mean()) < 0.1
    rows = torch.tensor([3, 39])
    assert torch.equal(codec.dequantize_rows(tensors, of, rows), decoded[rows])


def test_more_weights_to_a_point_leave_less_error():
    weight = torch.randn(64, 120, generator=torch.Generator().manual_seed(5))
    errors = []
    for together in (1, 2, 3):
        of = winding_scheme(64, 120, bits=4, dimension=together)
        errors.append(float((decode(encode(weight, of, "best"), of) - weight).square().mean()))
    assert errors[0] > errors[1] > errors[2]


def test_rates_of_three_weights_are_thirds():
    of = winding_scheme(bits=4.2, dimension=3)
    assert code_width(of) == 13
    assert of.bits == 13 / 3


@pytest.mark.parametrize("columns", [64, 60, 7])
def test_group_scales_follow_the_weights(columns: int):
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(16, columns, generator=generator) * 10 ** torch.randn(16, 1, generator=generator)
    plain, grouped = winding_scheme(16, columns, bits=5), winding_scheme(16, columns, bits=5, group_size=16)
    error = [
        float(((decode(encode(weight, of), of) - weight) / weight.norm(dim=1, keepdim=True)).norm())
        for of in (plain, grouped)
    ]
    assert error[1] < 0.2 * error[0]
    tensors = encode(weight, grouped)
    assert tensors["group_scale"].shape == (16, -(-columns // 16))
    rows = torch.tensor([0, 15])
    assert torch.equal(codec.dequantize_rows(tensors, grouped, rows), decode(tensors, grouped)[rows])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dimension": 5}, "dimension is 5, wanted 1, 2, 3 or 4"),
        ({"loss_max": 0}, "loss_max is 0, wanted None or a positive"),
        ({"group_size": 4}, "group_size is 4, wanted None or an integer from 8"),
        ({"incoherence": 1}, "incoherence is 1, wanted True or False"),
    ],
)
def test_mistakes_in_the_other_options(options: dict[str, object], match: str):
    with pytest.raises(ConfigError, match=match):
        WindingOptions(**options)


@pytest.mark.parametrize("loss_max", [0.02, 0.005, 0.001])
def test_the_smallest_rate_that_keeps_the_loss_bound(trained: Tensor, loss_max: float):
    config = HyperConfig(bits=8, hyperfunction="winding", effort="fast", winding={"loss_max": loss_max})
    shape_plan = plan_shape(config, tuple(trained.shape), reshapable=False)
    assert shape_plan is not None
    plan = plan_weight(config, trained, shape_plan)
    losses = {}
    for width in range(3, 17):
        of = winding_scheme(*trained.shape, bits=width / 2)
        losses[width] = float((decode(encode(trained, of, "fast"), of) - trained).abs().mean())
    if loss_max < losses[16]:
        assert plan is None
        return
    assert plan is not None
    assert losses[code_width(plan.scheme)] <= loss_max < losses[code_width(plan.scheme) - 1]


def test_weights_that_miss_the_loss_bound_stay(stories: Path, tmp_path: Path):
    config = HyperConfig(bits=5, hyperfunction="winding", effort="fast", winding={"loss_max": 0.004})
    model = AutoModelForCausalLM.from_pretrained(stories, quantization_config=config, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    kept, stored = [], []
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and name != "lm_head":
            kept.append(name)
            assert torch.equal(module.weight, original.get_submodule(name).weight)
        elif isinstance(module, HyperLayer):
            stored.append(name)
            assert (module.weight - original.get_submodule(name).weight).abs().mean() <= 0.004
    assert len(kept) + len(stored) == 35
    assert kept and stored
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.arange(3, 35)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_bound_that_no_weight_meets_is_an_error(stories: Path):
    config = HyperConfig(bits=2, hyperfunction="winding", effort="fast", winding={"loss_max": 1e-6})
    with pytest.raises(ConfigError, match="no weight meets loss_max 1e-06"):
        AutoModelForCausalLM.from_pretrained(stories, quantization_config=config, dtype=torch.float32)
