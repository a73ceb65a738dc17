"""Every operator on every device, dtype and awkward shape against float32 arithmetic on the decoded weight."""

import pytest
import torch
from helpers import assert_as_accurate_as
from torch.nn.functional import linear

from hf_hyper import codec
from hf_hyper.config import HyperConfig
from hf_hyper.errors import ShapeError
from hf_hyper.kernels import ops, reference
from hf_hyper.kernels.dispatch import explain
from hf_hyper.scheme import TensorScheme

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (16, 16), (172, 64), (48, 100), (130, 272)]


def stored(
    rows: int, columns: int, hyperfunction: str = "shift", bits: float = 4
) -> tuple[TensorScheme, list[torch.Tensor]]:
    scheme = HyperConfig(bits=bits, hyperfunction=hyperfunction).scheme(rows, columns)
    return scheme, list(codec.quantize(torch.randn(rows, columns), scheme, "fast").values())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("hyperfunction", ["shift", "winding"])
def test_matmul(hyperfunction: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    scheme, tensors = stored(rows, columns, hyperfunction, bits=5)
    weight = codec.dequantize(dict(zip(codec.tensor_specs(scheme), tensors, strict=True)), scheme)
    tensors = [tensor.to(device) for tensor in tensors]
    for count in (1, 3, 33):
        x = torch.randn(2, count, columns).to(dtype)
        got = ops.matmul(x.to(device), tensors, scheme.key).cpu()
        exact = linear(x.double(), weight.double())
        assert_as_accurate_as(exact, linear(x, weight.to(dtype)), got, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("bits", range(1, 9))
def test_decode(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    scheme, tensors = stored(48, 100, bits=bits)
    exact = codec.dequantize(dict(zip(codec.tensor_specs(scheme), tensors, strict=True)), scheme)
    got = ops.decode([tensor.to(device) for tensor in tensors], scheme.key, dtype).cpu()
    assert_as_accurate_as(exact, exact.to(dtype), got)


@pytest.mark.parametrize(("rows", "columns"), [(32, 48), (6, 13)])
@pytest.mark.parametrize("hyperfunction", ["shift", "winding"])
def test_opcheck(hyperfunction: str, rows: int, columns: int, device: torch.device) -> None:
    scheme, tensors = stored(rows, columns, hyperfunction)
    tensors = [tensor.to(device) for tensor in tensors]
    x = torch.randn(3, columns, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.hf_hyper.matmul.default, (x, tensors, scheme.key))
    torch.library.opcheck(torch.ops.hf_hyper.decode.default, (tensors, scheme.key, torch.float32))
    index = torch.tensor([[0, rows - 1]], device=device)
    torch.library.opcheck(torch.ops.hf_hyper.embedding.default, (index, tensors, scheme.key, torch.float32))


def test_gradient_reaches_the_input(device: torch.device) -> None:
    scheme, tensors = stored(32, 48)
    tensors = [tensor.to(device) for tensor in tensors]
    weight = ops.decode(tensors, scheme.key, torch.float32)
    x = torch.randn(2, 5, 48, device=device, requires_grad=True)
    grad = torch.randn(2, 5, 32, device=device)
    ops.matmul(x, tensors, scheme.key).backward(grad)
    assert x.grad is not None
    assert torch.allclose(x.grad, grad @ weight, atol=1e-5)


@pytest.mark.parametrize("row", [-1, 20, 32])
def test_rows_that_do_not_exist_are_refused(row: int) -> None:
    scheme, tensors = stored(20, 48)  # stored in blocks of 16
    with pytest.raises(IndexError, match=f"row {row} of an embedding, wanted 0 to 19"):
        ops.embedding(torch.tensor([[3, row]]), tensors, scheme.key, torch.float32)


def test_empty_batch() -> None:
    scheme, tensors = stored(32, 48)
    assert ops.matmul(torch.zeros(0, 48), tensors, scheme.key).shape == (0, 32)


def test_wrong_width_is_refused() -> None:
    scheme, tensors = stored(32, 48)
    with pytest.raises(ShapeError, match=r"input of shape \(2, 47\), wanted 48 in the last dimension"):
        ops.matmul(torch.zeros(2, 47), tensors, scheme.key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    scheme, tensors = stored(32, 48)
    with pytest.raises(ShapeError, match=r"wanted one of torch\.float32, torch\.bfloat16, torch\.float16"):
        ops.matmul(torch.zeros(2, 48, dtype=dtype), tensors, scheme.key)


@pytest.mark.parametrize("hyperfunction", ["shift", "winding"])
def test_autocast_casts_activations_as_a_linear_layer_does(hyperfunction: str) -> None:
    scheme, tensors = stored(32, 48, hyperfunction)
    x = torch.randn(70, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = ops.matmul(x, tensors, scheme.key)
    assert torch.equal(product, ops.matmul(x.bfloat16(), tensors, scheme.key))
    product.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert torch.allclose(x.grad, ops.decode(tensors, scheme.key, torch.float32).sum(0).expand(70, 48), atol=0.05)


def test_gradient_of_large_weights_stays_finite_in_float16() -> None:
    scheme = TensorScheme("shift", 4, 32, 48)
    tensors = list(codec.quantize(torch.randn(32, 48) * 3e4, scheme).values())
    x = (torch.randn(2, 48) * 1e-3).half().requires_grad_()
    (ops.matmul(x, tensors, scheme.key).float().mean() * 1e-3).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_explain_names_the_kernels() -> None:
    scheme, _ = stored(32, 48)
    assert "matmul on cpu: cpu.matmul_shift" in explain(scheme)
    assert "decode on mps: reference.decode" in explain(scheme, "mps")


def test_reference_agrees_with_the_compiled_core() -> None:
    scheme, tensors = stored(172, 100)
    named = dict(zip(codec.tensor_specs(scheme), tensors, strict=True))
    x = torch.randn(4, 100)
    assert torch.allclose(ops.matmul(x, tensors, scheme.key), reference.matmul(x, named, scheme), atol=1e-4)
