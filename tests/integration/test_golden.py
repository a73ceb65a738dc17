"""Files written by every released format version decode to the weights they stood for."""

import json
from pathlib import Path

import pytest
import torch
from format_decoder import decode_incoherence, decode_layout, decode_shift, decode_winding, split_experts
from helpers import relative_error
from safetensors import safe_open
from torch import Tensor

from hf_hyper import codec
from hf_hyper.kernels import ops
from hf_hyper.layout import MASK, Layout
from hf_hyper.nn.stored import decode, layer_specs
from hf_hyper.scheme import TensorScheme

FILES = sorted((Path(__file__).parent.parent / "golden").glob("format*/*.safetensors"))


def second_opinion(tensors: dict[str, Tensor], scheme: TensorScheme) -> Tensor:
    """The weight according to the decoder that was written from FORMAT.md alone."""
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items() if name != "codes"}
    codes = tensors["codes"].numpy()
    if scheme.hyperfunction == "shift":
        matrix = decode_shift(codes, arrays["scale"], int(scheme.bits))
    else:
        columns = scheme.padded_in if scheme.incoherence else scheme.in_features
        options, scale = dict(scheme.options), arrays.get("group_scale")
        matrix = decode_winding(codes, arrays["centre"], arrays["shell_side"], scheme.bits, options, columns, scale)
    if scheme.incoherence:
        matrix = decode_incoherence(matrix, arrays["out_scale"], scheme.in_features, scheme.seed, scheme.input_blocks)
    return torch.from_numpy(matrix[: scheme.out_features, : scheme.in_features].copy())


def test_there_are_golden_files() -> None:
    assert len(FILES) >= 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_golden_file(path: Path) -> None:
    with safe_open(path, "pt") as file:
        scheme = TensorScheme.parse(file.metadata()["scheme"])
        tensors = {name: file.get_tensor(name) for name in codec.tensor_specs(scheme)}
        expected = file.get_tensor("expected")
        fields = json.loads(file.metadata().get("layout", "null"))
        mask = file.get_tensor(MASK) if MASK in file.keys() else None
    if fields is not None and "experts" in fields:
        shape = tuple(fields.pop("shape"))
        parts = split_experts({k: (t if k == "codes" else t.double()).numpy() for k, t in tensors.items()}, fields)
        parts = [{name: torch.from_numpy(array) for name, array in part.items()} for part in parts]
        literal = torch.stack([second_opinion(part, scheme) for part in parts])
        assert relative_error(literal, expected) < 1e-6
        layout = Layout.from_fields(shape, fields)
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            name: spec.shape for name, spec in layer_specs(scheme, layout).items()
        }
        assert relative_error(decode(list(tensors.values()), scheme.key, layout, torch.float32), expected) < 1e-6
        return
    if fields is not None:
        shape = tuple(fields.pop("shape"))
        literal = decode_layout(
            second_opinion(tensors, scheme).numpy(), mask if mask is None else mask.numpy(), shape, fields
        )
        assert relative_error(torch.from_numpy(literal.copy()), expected) < 1e-6
        layout = Layout.from_fields(shape, fields)
        assert relative_error(layout.from_matrix(codec.dequantize(tensors, scheme), mask), expected) < 1e-6
        assert torch.equal(expected == 0, torch.from_numpy(literal == 0))
        return
    assert relative_error(codec.dequantize(tensors, scheme), expected) < 1e-6
    assert relative_error(ops.decode(list(tensors.values()), scheme.key, torch.float32), expected) < 1e-6
    assert relative_error(second_opinion(tensors, scheme), expected) < 1e-6


@pytest.mark.parametrize(
    "scheme",
    [
        TensorScheme("shift", 3.0, 20, 16 * 15 * 7 - 3, seed=5),
        TensorScheme("shift", 1.0, 130, 96, input_blocks=2, seed=2**64 - 1),
        TensorScheme("shift", 5.0, 40, 16 * 67 * 3),
    ],
    ids=["mixed", "blocks", "prime"],
)
def test_random_codes_decode_as_the_format_says(scheme: TensorScheme) -> None:
    tensors = {
        name: torch.randint(-(2**31), 2**31, spec.shape).int()
        if spec.dtype == torch.int32
        else torch.rand(spec.shape).to(spec.dtype)
        for name, spec in codec.tensor_specs(scheme).items()
    }
    assert relative_error(codec.dequantize(tensors, scheme), second_opinion(tensors, scheme)) < 1e-6
