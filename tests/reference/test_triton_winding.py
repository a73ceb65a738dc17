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

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

CASES = [
    (70, 300, 4, 1, torch.bfloat16),
    (5, 13, 6.5, 3, torch.float32),
    (64, 64, 8, 17, torch.float16),
    (33, 97, 2.5, 70, torch.bfloat16),
    (16, 40, 3, 65, torch.float32),
]
"""Rows, columns, bits, tokens, dtype: odd widths, codes across words, several shares, both ways to multiply."""


def stored(rows: int, columns: int, bits: float) -> tuple[TensorScheme, dict[str, torch.Tensor]]:
    scheme = HyperConfig(bits=bits, hyperfunction="winding").scheme(rows, columns)
    tensors = codec.quantize(torch.randn(rows, columns), scheme, "fast")
    return scheme, {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("rows", "columns", "bits", "tokens", "dtype"), CASES)
def test_product(rows: int, columns: int, bits: float, tokens: int, dtype: torch.dtype) -> None:
    scheme, tensors = stored(rows, columns, bits)
    weight = codec.dequantize(tensors, scheme).cpu()
    x = torch.randn(tokens, columns).to(dtype)
    got = cuda_winding.matmul_winding(x.to(DEVICE), tensors, scheme).cpu()
    assert_as_accurate_as(linear(x.double(), weight.double()), linear(x, weight.to(dtype)), got, atol=2e-5)


def test_decoded_weight() -> None:
    scheme, tensors = stored(30, 71, 5)
    tensors["codes"] = torch.randint(-(2**31), 2**31, tensors["codes"].shape).int().to(DEVICE)  # also what is no code
    got = cuda_winding.decode_winding(tensors, scheme, torch.float32)
    wanted = reference.decode(tensors, scheme, torch.float32)
    # A device may join the product and the sum into one rounding.
    assert torch.allclose(got, wanted, rtol=0, atol=2e-7 * float(wanted.abs().max()))


@pytest.mark.parametrize("tokens", [2, 70])
def test_inputs_that_are_not_contiguous(tokens: int) -> None:
    scheme, tensors = stored(33, 97, 4)
    weight = codec.dequantize(tensors, scheme).cpu()
    spread = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in tensors.items()}
    x = torch.randn(97, tokens).T
    got = cuda_winding.matmul_winding(x.to(DEVICE), spread, scheme).cpu()
    assert_as_accurate_as(linear(x.double(), weight.double()), linear(x, weight), got, atol=2e-5)


def test_no_tokens() -> None:
    scheme, tensors = stored(8, 8, 4)
    assert cuda_winding.matmul_winding(torch.zeros(0, 8, device=DEVICE), tensors, scheme).shape == (0, 8)


def test_table_takes_the_kernels_where_they_can_run() -> None:
    scheme, _ = stored(8, 8, 4)
    assert "matmul on cuda: cuda.matmul_winding" in dispatch.explain(scheme, "cuda")
    rotated = TensorScheme("winding", scheme.bits, 8, 8, incoherence=True, options=scheme.options)
    assert "(cuda.matmul_winding covers weights without incoherence only)" in dispatch.explain(rotated, "cuda")
