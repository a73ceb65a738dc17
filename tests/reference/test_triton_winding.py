"""Triton kernels of `winding` against the reference: under the interpreter on the CPU, compiled on a CUDA device."""

import os

import pytest
import torch
from helpers import assert_as_accurate_as
from torch.nn.functional import linear

pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device and no TRITON_INTERPRET=1", allow_module_level=True)

from hf_hyper import codec
from hf_hyper.config import HyperConfig
from hf_hyper.kernels import cuda_winding, dispatch, reference
from hf_hyper.scheme import TensorScheme

CASES = [
    (70, 300, 4, 1, torch.bfloat16),
    (5, 13, 6.5, 3, torch.float32),
    (64, 64, 8, 17, torch.float16),
    (33, 97, 2.5, 70, torch.bfloat16),
    (16, 40, 3, 65, torch.float32),
]
"""Rows, columns, bits, tokens, dtype: odd widths, codes across words, several shares, both ways to multiply."""


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: tensors of the CPU under the interpreter, or a CUDA device."""
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("no CUDA device" if request.param == "cuda" else "a CUDA device is there to compile for")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


def stored(rows: int, columns: int, bits: float, device: torch.device) -> tuple[TensorScheme, dict[str, torch.Tensor]]:
    scheme = HyperConfig(bits=bits, hyperfunction="winding").scheme(rows, columns)
    tensors = codec.quantize(torch.randn(rows, columns), scheme, "fast")
    return scheme, {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("rows", "columns", "bits", "tokens", "dtype"), CASES)
def test_product(rows: int, columns: int, bits: float, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    scheme, tensors = stored(rows, columns, bits, device)
    weight = codec.dequantize(tensors, scheme).cpu()
    x = torch.randn(tokens, columns).to(dtype)
    got = cuda_winding.matmul_winding(x.to(device), tensors, scheme).cpu()
    assert_as_accurate_as(linear(x.double(), weight.double()), linear(x, weight.to(dtype)), got, atol=2e-5)


def test_decoded_weight(device: torch.device) -> None:
    scheme, tensors = stored(30, 71, 5, device)
    tensors["codes"] = torch.randint(-(2**31), 2**31, tensors["codes"].shape).int().to(device)  # also what is no code
    got = cuda_winding.decode_winding(tensors, scheme, torch.float32)
    wanted = reference.decode(tensors, scheme, torch.float32)
    # A device may join the product and the sum into one rounding.
    assert torch.allclose(got, wanted, rtol=0, atol=2e-7 * float(wanted.abs().max()))


@pytest.mark.parametrize("tokens", [2, 70])
def test_inputs_that_are_not_contiguous(tokens: int, device: torch.device) -> None:
    scheme, tensors = stored(33, 97, 4, device)
    weight = codec.dequantize(tensors, scheme).cpu()
    spread = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in tensors.items()}
    x = torch.randn(97, tokens).T
    got = cuda_winding.matmul_winding(x.to(device), spread, scheme).cpu()
    assert_as_accurate_as(linear(x.double(), weight.double()), linear(x, weight), got, atol=2e-5)


def test_no_tokens(device: torch.device) -> None:
    scheme, tensors = stored(8, 8, 4, device)
    assert cuda_winding.matmul_winding(torch.zeros(0, 8, device=device), tensors, scheme).shape == (0, 8)


def test_embedding(device: torch.device) -> None:
    scheme, tensors = stored(20, 33, 5, device)
    weight = codec.dequantize(tensors, scheme).cpu()
    index = torch.tensor([[0, 19, 3], [3, -1, 20]])
    got = cuda_winding.embedding_winding(index.to(device), tensors, scheme, torch.float32).cpu()
    assert got[1, 1:].isnan().all()
    assert torch.allclose(got.flatten(0, 1)[:4], weight[index.flatten()[:4]], rtol=0, atol=1e-6)
    assert cuda_winding.embedding_winding(index[:0].to(device), tensors, scheme, torch.float16).shape == (0, 3, 33)


@pytest.mark.parametrize(("rows", "columns", "bits", "tokens"), [(70, 97, 4, 9), (5, 13, 6.5, 2), (64, 64, 8, 70)])
def test_experts(rows: int, columns: int, bits: float, tokens: int, device: torch.device) -> None:
    parts = [stored(rows, columns, bits, torch.device("cpu")) for _ in range(3)]
    scheme, tensors = parts[0][0], codec.stacked([part for _, part in parts])
    x, ids = torch.randn(tokens, columns), torch.randint(-1, 4, (tokens,))
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    got = cuda_winding.matmul_experts_winding(x.to(device), ids.to(device), moved, scheme).cpu()
    wanted = reference.matmul_experts(x, ids, tensors, scheme)
    assert torch.equal(got[(ids < 0) | (ids > 2)], torch.zeros(int(((ids < 0) | (ids > 2)).sum()), rows))
    assert torch.allclose(got, wanted, atol=2e-5 * float(wanted.abs().max()))
    nothing = cuda_winding.matmul_experts_winding(x[:0].to(device), ids[:0].to(device), moved, scheme)
    assert nothing.shape == (0, rows)


def test_table_takes_the_kernels_where_they_can_run() -> None:
    scheme, _ = stored(8, 8, 4, torch.device("cpu"))
    explained = dispatch.explain(scheme, "cuda")
    assert "matmul on cuda: cuda.matmul_winding" in explained
    assert "matmul_experts on cuda: cuda.matmul_experts_winding" in explained
    assert "embedding on cuda: cuda.embedding_winding" in explained
    rotated = TensorScheme("winding", scheme.bits, 8, 8, incoherence=True, options=scheme.options)
    assert "(cuda.matmul_winding covers weights without incoherence only)" in dispatch.explain(rotated, "cuda")
