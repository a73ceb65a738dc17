import pytest
import torch
from helpers import relative_error

from hf_hyper import codec
from hf_hyper.config import HyperConfig
from hf_hyper.errors import ShapeError
from hf_hyper.kernels import ops
from hf_hyper.scheme import TensorScheme

# Mean squared errors of `shift` on unit Gaussian data at full search (design table), with room for the short search.
GAUSSIAN_ERROR = {1: 0.269, 2: 0.0688, 3: 0.0178, 4: 0.0047, 5: 0.0013}


@pytest.mark.parametrize("bits", GAUSSIAN_ERROR)
def test_error_on_gaussian_weights_is_that_of_the_table(bits: int) -> None:
    weight = torch.randn(128, 128)
    scheme = TensorScheme("shift", bits, 128, 128)
    error = relative_error(codec.dequantize(codec.quantize(weight, scheme), scheme), weight) ** 2
    assert error < 1.1 * GAUSSIAN_ERROR[bits]


@pytest.mark.parametrize("hyperfunction", ["shift", "winding"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (172, 64), (16, 1003), (40, 176), (3, 50)])
def test_any_shape_comes_back(hyperfunction: str, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns)
    scheme = HyperConfig(bits=6, hyperfunction=hyperfunction).scheme(rows, columns)
    tensors = codec.quantize(weight, scheme)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in codec.tensor_specs(scheme).items()
    }
    decoded = codec.dequantize(tensors, scheme)
    assert decoded.shape == weight.shape
    assert relative_error(decoded, weight) < 0.04


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(576, 1536), (16, 100003)])
def test_large_shapes_come_back(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns)
    scheme = TensorScheme("shift", 4, rows, columns)
    assert relative_error(codec.dequantize(codec.quantize(weight, scheme), scheme), weight) < 0.08


def test_every_row_keeps_its_own_precision() -> None:
    """Zero, constant, subnormal and huge rows share a rotation block with ordinary ones."""
    weight = torch.randn(32, 64)
    weight[3] = 0
    weight[5] = 0.25
    weight[7] *= 1e-39
    weight[9] *= 1e30
    weight[11] *= 1e37
    scheme = TensorScheme("shift", 4, 32, 64)
    decoded = codec.dequantize(codec.quantize(weight, scheme), scheme)
    assert torch.equal(decoded[3], torch.zeros(64))
    for row in set(range(32)) - {3}:
        assert relative_error(decoded[row], weight[row]) < 0.12, row


@pytest.mark.parametrize("value", [0.0, 1.0, -3e38, 1e-44])
@pytest.mark.parametrize(("hyperfunction", "bits"), [("shift", 1), ("shift", 3), ("shift", 5), ("winding", 5)])
def test_constant_matrices_come_back(value: float, hyperfunction: str, bits: int) -> None:
    weight = torch.full((16, 48), value)
    scheme = HyperConfig(bits=bits, hyperfunction=hyperfunction).scheme(16, 48)
    decoded = codec.dequantize(codec.quantize(weight, scheme), scheme)
    assert torch.isfinite(decoded).all()
    allowed = 4 * GAUSSIAN_ERROR[bits] ** 0.5 if hyperfunction == "shift" else 0.25
    assert float((decoded.double() - weight.double()).abs().max()) <= allowed * abs(value) + 1e-40


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_value_that_is_not_finite_names_the_tensor(value: float) -> None:
    weight = torch.randn(16, 16)
    weight[2, 5] = value
    with pytest.raises(ShapeError, match=r"layers\.0\.q: (nan|-?inf) at row 2, column 5"):
        codec.quantize(weight, TensorScheme("shift", 4, 16, 16), name="layers.0.q")


def test_wrong_shape_names_both_shapes() -> None:
    with pytest.raises(ShapeError, match=r"shape \(16, 8\), wanted \(8, 16\)"):
        codec.quantize(torch.randn(16, 8), TensorScheme("shift", 4, 8, 16))


def test_bits_per_weight_counts_everything() -> None:
    scheme = TensorScheme("shift", 4, 576, 1536)
    tensors = codec.quantize(torch.zeros(576, 1536), scheme, "fast")
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert codec.bits_per_weight(scheme) == 8 * stored / weight_count(scheme)
    assert 4.02 < codec.bits_per_weight(scheme) < 4.03


def weight_count(scheme: TensorScheme) -> int:
    return scheme.out_features * scheme.in_features


@pytest.mark.parametrize("bits", [2, 4])
def test_rotation_makes_outliers_harmless(bits: int) -> None:
    """A few large columns cost a plain Gaussian code dearly and a rotated one nothing."""
    weight = torch.randn(64, 128)
    weight[:, ::37] *= 30
    scheme = TensorScheme("shift", bits, 64, 128)
    decoded = codec.dequantize(codec.quantize(weight, scheme), scheme)
    assert relative_error(decoded, weight) ** 2 < 1.15 * GAUSSIAN_ERROR[bits]


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hyperfunction", ["shift", "winding"])
def test_default_dtype_of_torch_changes_nothing(hyperfunction: str, default: torch.dtype) -> None:
    """A seed of its own for each case, so that nothing cached under another default is found."""
    weight, x = torch.randn(48, 80), torch.randn(3, 80)
    seed = 1000 + [torch.float32, torch.float64, torch.bfloat16, torch.float16].index(default)
    scheme = HyperConfig(bits=6, hyperfunction=hyperfunction, seed=seed).scheme(48, 80)
    wanted = codec.quantize(weight, scheme)
    torch.set_default_dtype(default)
    try:
        tensors = codec.quantize(weight, scheme)
        product = ops.matmul(x, list(tensors.values()), scheme.key)
        decoded = ops.decode(list(tensors.values()), scheme.key, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert relative_error(decoded, weight) < 0.04
    assert relative_error(product, x @ decoded.T) < 1e-5
