"""The grouped Triton kernel of experts against the reference: under the interpreter, or compiled on a CUDA device."""

import os

import pytest
import torch
from helpers import assert_as_accurate_as
from torch import Tensor
from torch.nn.functional import linear

pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device and no TRITON_INTERPRET=1", allow_module_level=True)

from hf_hyper import codec
from hf_hyper._triton import experts
from hf_hyper.kernels import cuda_experts, dispatch, ops, reference
from hf_hyper.scheme import TensorScheme

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

CASES = [
    (4, 48, 100, 4, 7, BFLOAT16),
    (3, 16, 576, 2, 5, FLOAT16),
    (5, 172, 64, 3, 40, FLOAT32),
    (1, 1, 1, 4, 2, FLOAT32),
    (2, 33, 80, 5, 70, BFLOAT16),
    (9, 20, 272, 1, 3, FLOAT32),
    (2, 64, 16, 8, 1, FLOAT16),
    (2, 40, 1040, 4, 2, BFLOAT16),
    (2, 128, 1024, 4, 2, FLOAT32),
]
"""Experts, rows, columns, bits, tokens, dtype: padding on both sides, odd factors, some experts without rows; in the
last two several shares of the columns.
"""


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: tensors of the CPU under the interpreter, or a CUDA device."""
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("no CUDA device" if request.param == "cuda" else "a CUDA device is there to compile for")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


def bank(count: int, scheme: TensorScheme) -> tuple[Tensor, dict[str, Tensor]]:
    """Decoded weights `[experts, out, in]` that grow by 16 from expert to expert, and their tensors."""
    shape = (scheme.out_features, scheme.in_features)
    parts = [codec.quantize(torch.randn(shape) * size(expert), scheme, "fast") for expert in range(count)]
    return torch.stack([codec.dequantize(part, scheme) for part in parts]), codec.stacked(parts)


def size(expert: int) -> float:
    return 16.0 ** (expert % 3)


def product(x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Row by row."""
    return torch.stack([linear(row, weight[int(expert)]) for row, expert in zip(x, ids, strict=True)])


@pytest.mark.parametrize(("count", "rows", "columns", "bits", "tokens", "dtype"), CASES)
def test_product(
    count: int, rows: int, columns: int, bits: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    scheme = TensorScheme("shift", bits, rows, columns, seed=5)
    weight, tensors = bank(count, scheme)
    x, ids = torch.randn(tokens, columns).to(dtype), torch.randint(count, (tokens,))
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    got = cuda_experts.matmul_shift(x.to(device), ids.to(device), moved, scheme).cpu()
    unit = torch.tensor([size(int(expert)) for expert in ids]).unsqueeze(1)  # powers of two: division is exact
    exact, plain = product(x.double(), ids, weight.double()) / unit, product(x, ids, weight.to(dtype)) / unit.to(dtype)
    assert_as_accurate_as(exact, plain, got / unit.to(dtype), atol=2e-5)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_rows_without_an_expert_are_zero(kind: torch.dtype, device: torch.device) -> None:
    scheme = TensorScheme("shift", 4, 20, 40)
    _, tensors = bank(3, scheme)
    x, ids = torch.randn(6, 40), torch.tensor([3, 0, -1, 2, 7, 0], dtype=kind)
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    got = cuda_experts.matmul_shift(x.to(device), ids.to(device), moved, scheme).cpu()
    assert torch.equal(got[[0, 2, 4]], torch.zeros(3, 20))
    assert torch.allclose(got, reference.matmul_experts(x, ids, tensors, scheme), atol=1e-3)


def test_no_rows(device: torch.device) -> None:
    scheme = TensorScheme("shift", 4, 16, 64)
    tensors = {name: tensor.to(device) for name, tensor in bank(2, scheme)[1].items()}
    nothing = torch.zeros(0, 64, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    assert cuda_experts.matmul_shift(*nothing, tensors, scheme).shape == (0, 16)


@pytest.mark.parametrize("block", [1, 2, 16])
@pytest.mark.parametrize("ids", [[2, 0, 2, 2, 9, 0, 2], [1] * 9, [-1, 5], list(range(5)) * 3], ids=str)
def test_schedule_covers_every_row_once(ids: list[int], block: int) -> None:
    order, owner, first, last = (part.tolist() for part in experts.schedule(torch.tensor(ids), 5, block))
    covered = []
    for expert, begin, end in zip(owner, first, last, strict=True):
        if expert < 5:
            rows = order[begin : min(begin + block, end)]
            assert rows
            assert {ids[row] for row in rows} == {expert}
            covered += rows
    assert sorted(covered) == [row for row, expert in enumerate(ids) if 0 <= expert < 5]


def test_table_takes_the_kernel() -> None:
    assert "matmul_experts on cuda: cuda.matmul_experts_shift" in dispatch.explain(
        TensorScheme("shift", 4, 32, 4096), "cuda"
    )


@pytest.mark.cuda
def test_captured_into_a_graph() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scheme = TensorScheme("shift", 4, 256, 512)
    tensors = {name: tensor.cuda() for name, tensor in bank(4, scheme)[1].items()}
    x, ids = torch.randn(8, 512, device="cuda", dtype=FLOAT16), torch.arange(8, device="cuda") % 4
    ops.matmul_experts(x, ids, list(tensors.values()), scheme.key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.matmul_experts(x, ids, list(tensors.values()), scheme.key)
    x.copy_(torch.randn(8, 512))
    ids.copy_(torch.tensor([3, 3, 3, 3, 3, 3, 0, 9]))
    graph.replay()
    wanted = reference.matmul_experts(x.float(), ids, tensors, scheme)
    assert torch.allclose(y.float(), wanted, atol=2e-3 * float(wanted.abs().max()))
