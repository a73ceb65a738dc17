"""Weights of any shape to matrices and back, masks, and what is left alone."""

import math

import pytest
import torch
from torch import Tensor

from hf_hyper import FormatError, HyperConfig, ShapeError
from hf_hyper.layout import Layout, mask_entropy, prune
from hf_hyper.packing import unpack
from hf_hyper.plan import LEAST_GAIN, bits_per_weight, plan_shape, plan_weight


def sparse(shape: tuple[int, ...], density: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < density, weight, 0.0)


def literal_places(numbers: list[int], width: int) -> list[int]:
    """Places of the kept weights, one number of the mask at a time as FORMAT.md tells it."""
    place, kept = 0, []
    for number in numbers:
        place += number
        if number < 2**width - 1:
            kept.append(place)
            place += 1
    return kept


@pytest.mark.parametrize("shape", [(64, 9), (32, 1, 3, 3), (8, 4, 6), (6, 2, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("rows", [None, 1, 6, 12])
def test_reshaped_weights_come_back(shape: tuple[int, ...], rows: int | None) -> None:
    layout, weight = Layout(shape, rows), torch.randn(shape)
    assert layout.to_matrix(weight).shape == layout.matrix
    assert torch.equal(layout.from_matrix(layout.to_matrix(weight)), weight)
    assert Layout.from_fields(shape, layout.fields()) == layout


@pytest.mark.parametrize("density", [0.001, 0.05, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(48, 33), (16, 8, 3, 3)], ids=str)
def test_masks_come_back_and_read_as_the_format_says(shape: tuple[int, ...], density: float) -> None:
    weight = sparse(shape, density)
    layout, mask = prune(weight)
    assert torch.equal(layout.from_matrix(layout.to_matrix(weight), mask), weight)
    assert Layout.from_fields(shape, layout.fields()) == layout
    pruned = layout.pruned
    assert pruned is not None
    numbers = unpack(mask, pruned.mask_width, pruned.mask_codes).tolist()
    assert literal_places(numbers, pruned.mask_width) == weight.flatten().nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("density", [0.02, 0.1, 0.2, 0.35, 0.5])
def test_masks_cost_little_more_than_their_entropy(density: float) -> None:
    layout, mask = prune(sparse((512, 512), density))
    bits = 32 * len(mask) / layout.num_weights
    assert 0.98 * mask_entropy(layout) < bits < 1.19 * mask_entropy(layout)
    assert bits <= 1.001


def test_a_mask_that_keeps_another_number_of_weights_is_refused() -> None:
    weight = sparse((32, 32), 0.3)
    layout, mask = prune(weight)
    with pytest.raises(FormatError, match="mask keeps"):
        layout.from_matrix(layout.to_matrix(weight), torch.full_like(mask, -1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 5}, "rows 5 do not divide 288 weights"),
        ({"rows": 0}, "rows 0"),
        ({"pruned": {"kept": 3}}, "wanted positive integers kept, columns, mask_width, mask_codes"),
        ({"pruned": {"kept": 3, "columns": 0, "mask_width": 1, "mask_codes": 9}}, "wanted positive integers"),
    ],
)
def test_records_that_do_not_fit_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Layout.from_fields((32, 9), fields)


def test_a_layout_is_for_one_shape() -> None:
    with pytest.raises(ShapeError, match=r"shape \(3, 4\), wanted \(4, 3\)"):
        Layout((4, 3)).to_matrix(torch.zeros(3, 4))


@pytest.mark.parametrize("hyperfunction", ["shift", "winding"])
@pytest.mark.parametrize(
    "shape", [(576, 1, 3, 3), (96, 24, 1, 1), (64, 3, 7, 7), (3, 64, 3, 3), (128, 64, 3, 3)], ids=str
)
def test_other_rows_are_taken_where_they_save_something(shape: tuple[int, ...], hyperfunction: str) -> None:
    config = HyperConfig(bits=4, hyperfunction=hyperfunction)
    plan = plan_shape(config, shape, reshapable=True)
    assert plan is not None
    total = math.prod(shape)
    every = [Layout(shape, rows) for rows in range(1, total + 1) if total % rows == 0]
    cost = [bits_per_weight(config.scheme(*layout.matrix), layout) for layout in every]
    chosen = bits_per_weight(plan.scheme, plan.layout)
    assert chosen <= 1.05 * min(cost)
    assert chosen < 5
    natural = bits_per_weight(config.scheme(*Layout(shape).matrix), Layout(shape))
    assert (plan.layout.rows is None) == (natural <= 1.05 * min(cost))


def test_layers_that_gain_nothing_are_left_alone() -> None:
    config = HyperConfig(bits=4)
    assert plan_shape(config, (2, 64), reshapable=False) is None
    assert plan_shape(config, (0, 64), reshapable=False) is None
    assert bits_per_weight(config.scheme(2, 64), Layout((2, 64))) >= LEAST_GAIN
    assert plan_shape(config, (16, 64), reshapable=False) is not None


@pytest.mark.parametrize("density", [0.95, 0.5, 0.1, 0.0])
def test_zeros_of_pruned_weights_survive(density: float) -> None:
    config, weight = HyperConfig(bits=4), sparse((128, 256), density)
    dense = plan_shape(config, (128, 256), reshapable=False)
    assert dense is not None
    plan = plan_weight(config, weight, dense)
    if not 0 < density < 7 / 8:
        assert plan == dense
        return
    assert bits_per_weight(plan.scheme, plan.layout) < bits_per_weight(dense.scheme, dense.layout)
    tensors = plan.quantize(weight, "fast")
    assert set(tensors) == {"codes", "scale", "out_scale", "mask"}
