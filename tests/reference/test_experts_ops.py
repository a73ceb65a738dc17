"""`matmul_experts` on every device against float32 arithmetic on the decoded weights."""

import pytest
import torch
from helpers import assert_as_accurate_as
from torch import Tensor
from torch.nn.functional import linear

from hf_hyper import codec
from hf_hyper.config import HyperConfig
from hf_hyper.errors import ShapeError
from hf_hyper.kernels import ops, reference
from hf_hyper.scheme import TensorScheme

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bank(
    experts: int, rows: int, columns: int, hyperfunction: str = "shift", bits: float = 5, **winding: object
) -> tuple[TensorScheme, list[Tensor], Tensor]:
    """Scheme, tensors and decoded weights `[experts, rows, columns]`."""
    config = HyperConfig(bits=bits, hyperfunction=hyperfunction, winding=winding or None)
    scheme = config.scheme(rows, columns)
    parts = [codec.quantize(torch.randn(rows, columns), scheme, "fast") for _ in range(experts)]
    decoded = torch.stack([codec.dequantize(part, scheme) for part in parts])
    return scheme, list(codec.stacked(parts).values()), decoded


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (48, 100), (172, 64), (130, 272)])
@pytest.mark.parametrize("hyperfunction", ["shift", "winding"])
def test_product(hyperfunction: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    scheme, tensors, weight = bank(4, rows, columns, hyperfunction)
    tensors = [tensor.to(device) for tensor in tensors]
    for count in (1, 3, 70):
        x, ids = torch.randn(count, columns).to(dtype), torch.randint(3, (count,))
        got = ops.matmul_experts(x.to(device), ids.to(device), tensors, scheme.key).cpu()
        for expert in ids.unique():
            own = ids == expert
            exact, plain = linear(x[own].double(), weight[expert].double()), linear(x[own], weight[expert].to(dtype))
            assert_as_accurate_as(exact, plain, got[own], atol=2e-5)


def test_same_rows_give_the_bits_of_the_plain_product() -> None:
    scheme, tensors, _ = bank(3, 48, 100)
    x, ids = torch.randn(9, 100), torch.tensor([2, 0, 2, 2, 0, 2, 0, 0, 2])
    got = ops.matmul_experts(x, ids, tensors, scheme.key)
    for expert in (0, 2):
        wanted = ops.matmul(x[ids == expert], [tensor[expert] for tensor in tensors], scheme.key)
        assert torch.equal(got[ids == expert], wanted)


def test_experts_without_rows_are_not_decoded(device: torch.device) -> None:
    scheme, tensors, weight = bank(3, 32, 48)
    tensors[1][1] = torch.nan  # scales of the expert that nothing is sent to
    x, ids = torch.randn(4, 48), torch.tensor([0, 2, 2, 0])
    got = ops.matmul_experts(x.to(device), ids.to(device), [t.to(device) for t in tensors], scheme.key).cpu()
    wanted = torch.stack([weight[i] @ row for row, i in zip(x, ids, strict=True)])
    assert torch.allclose(got, wanted, atol=1e-3)


@pytest.mark.parametrize("hyperfunction", ["shift", "winding"])
def test_rows_without_an_expert_are_zero(hyperfunction: str, device: torch.device) -> None:
    scheme, tensors, _ = bank(3, 20, 40, hyperfunction)
    ids = torch.tensor([3, 0, -1, 2]).to(device)
    got = ops.matmul_experts(torch.randn(4, 40, device=device), ids, [t.to(device) for t in tensors], scheme.key)
    assert torch.equal(got[[0, 2]].cpu(), torch.zeros(2, 20))
    assert bool((got[[1, 3]] != 0).any())


@pytest.mark.parametrize("winding", [{}, {"dimension": 3}, {"incoherence": True, "group_size": 8}], ids=str)
def test_winding_of_any_kind(winding: dict) -> None:
    scheme, tensors, weight = bank(2, 20, 40, "winding", bits=4, **winding)
    x, ids = torch.randn(5, 40), torch.tensor([1, 0, 1, 1, 0])
    wanted = torch.stack([weight[i] @ row for row, i in zip(x, ids, strict=True)])
    assert torch.allclose(ops.matmul_experts(x, ids, tensors, scheme.key), wanted, atol=1e-4)


@pytest.mark.parametrize("hyperfunction", ["shift", "winding"])
def test_operator_passes_opcheck(hyperfunction: str, device: torch.device) -> None:
    scheme, tensors, _ = bank(3, 32, 48, hyperfunction)
    tensors = [tensor.to(device) for tensor in tensors]
    x, ids = torch.randn(5, 48, device=device, requires_grad=True), torch.tensor([2, 0, 0, 2, 5], device=device)
    torch.library.opcheck(torch.ops.hf_hyper.matmul_experts.default, (x, ids, tensors, scheme.key))


def test_gradient_reaches_the_input(device: torch.device) -> None:
    scheme, tensors, weight = bank(3, 32, 48)
    x = torch.randn(5, 48, device=device, requires_grad=True)
    ids, gradient = torch.tensor([2, 0, -1, 2, 3]), torch.randn(5, 32)
    product = ops.matmul_experts(x, ids.to(device), [tensor.to(device) for tensor in tensors], scheme.key)
    product.backward(gradient.to(device))
    assert x.grad is not None
    wanted = torch.stack([gradient[0] @ weight[2], gradient[1] @ weight[0], gradient[3] @ weight[2]])
    assert torch.allclose(x.grad[[0, 1, 3]].cpu(), wanted, atol=1e-4)
    assert torch.equal(x.grad[[2, 4]].cpu(), torch.zeros(2, 48))


def test_no_rows(device: torch.device) -> None:
    scheme, tensors, _ = bank(2, 32, 48)
    nothing = torch.zeros(0, 48, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    assert ops.matmul_experts(*nothing, [t.to(device) for t in tensors], scheme.key).shape == (0, 32)


@pytest.mark.parametrize(
    ("x", "ids"),
    [
        (torch.zeros(2, 47), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 48), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 2, 48), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 48), torch.zeros(2)),
    ],
    ids=["width", "rows", "dimensions", "dtype"],
)
def test_arguments_that_do_not_fit(x: Tensor, ids: Tensor) -> None:
    scheme, tensors, _ = bank(2, 32, 48)
    with pytest.raises(ShapeError, match="wanted"):
        ops.matmul_experts(x, ids, tensors, scheme.key)


def test_reference_agrees_with_the_compiled_core() -> None:
    scheme, tensors, _ = bank(3, 172, 100)
    named = dict(zip(codec.tensor_specs(scheme), tensors, strict=True))
    x, ids = torch.randn(8, 100), torch.randint(3, (8,))
    wanted = reference.matmul_experts(x, ids, named, scheme)
    assert torch.allclose(ops.matmul_experts(x, ids, tensors, scheme.key), wanted, atol=1e-4)
