"""`winding` with other numbers of weights to a point, and with scales of groups."""

import pytest
import torch
from helpers import decode_winding, winding_scheme
from torch import Tensor

from hf_hyper import codec, hyperfunctions
from hf_hyper.encoders import encode
from hf_hyper.hyperfunctions.winding import DIRECTIONS, code_width
from hf_hyper.scheme import TensorScheme


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
    decoded = decode_winding(tensors, of)
    assert float((decoded - weight).square().mean() / weight.square().mean()) < 0.1
    rows = torch.tensor([3, 39])
    assert torch.equal(codec.dequantize_rows(tensors, of, rows), decoded[rows])


def test_more_weights_to_a_point_leave_less_error():
    weight = torch.randn(64, 120, generator=torch.Generator().manual_seed(5))
    errors = []
    for together in (1, 2, 3):
        of = winding_scheme(64, 120, bits=4, dimension=together)
        errors.append(float((decode_winding(encode(weight, of, "best"), of) - weight).square().mean()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("columns", [64, 60, 7])
def test_group_scales_follow_the_weights(columns: int):
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(16, columns, generator=generator) * 10 ** torch.randn(16, 1, generator=generator)
    plain, grouped = winding_scheme(16, columns, bits=5), winding_scheme(16, columns, bits=5, group_size=16)
    error = [
        float(((decode_winding(encode(weight, of), of) - weight) / weight.norm(dim=1, keepdim=True)).norm())
        for of in (plain, grouped)
    ]
    assert error[1] < 0.2 * error[0]
    tensors = encode(weight, grouped)
    assert tensors["group_scale"].shape == (16, -(-columns // 16))
    rows = torch.tensor([0, 15])
    assert torch.equal(codec.dequantize_rows(tensors, grouped, rows), decode_winding(tensors, grouped)[rows])
