"""Triton kernels of `shift` against the reference: under the interpreter on CPU tensors, compiled on a CUDA device."""

import os

import pytest
import torch
from helpers import assert_as_accurate_as
from torch.nn.functional import linear

pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device and no TRITON_INTERPRET=1", allow_module_level=True)

from hf_hyper import codec
from hf_hyper._triton import shift_matmul
from hf_hyper.hyperfunctions.shift import MULTIPLIER, byte_sums, states
from hf_hyper.kernels import cuda, dispatch, ops, reference
from hf_hyper.scheme import TensorScheme

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

CASES = [
    (172, 100, 4, 1, BFLOAT16),
    (16, 576, 2, 3, FLOAT16),
    (48, 272, 3, 5, FLOAT32),
    (1, 1, 4, 2, FLOAT32),
    (16, 16, 8, 33, BFLOAT16),
    (200, 48, 1, 17, FLOAT32),
    (33, 80, 5, 1, FLOAT16),
    (64, 128, 6, 2, BFLOAT16),
    (20, 1040, 7, 1, FLOAT32),
    (256, 256, 4, 1, BFLOAT16),
    (144, 11 * 16, 4, 2, FLOAT32),
    (16, 67 * 16, 4, 2, FLOAT32),
]
"""Rows, columns, bits, tokens, dtype: padding on both sides, several shares of the columns, whole steps of programs and
others, and odd factors that are mixed one by one, by a matrix, and before the launch."""


def stored(scheme: TensorScheme, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A decoded weight in float64 and its tensors on the device."""
    tensors = codec.quantize(torch.randn(scheme.out_features, scheme.in_features), scheme, "fast")
    weight = codec.dequantize(tensors, scheme)
    return weight.double(), {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: tensors of the CPU under the interpreter, or a CUDA device."""
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("no CUDA device" if request.param == "cuda" else "a CUDA device is there to compile for")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.mark.parametrize(("rows", "columns", "bits", "tokens", "dtype"), CASES)
def test_fused_product(
    rows: int, columns: int, bits: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    scheme = TensorScheme("shift", bits, rows, columns, seed=5)
    weight, tensors = stored(scheme, device)
    x = torch.randn(tokens, columns).to(dtype)
    got = cuda.matmul_shift(x.to(device), tensors, scheme).cpu()
    assert_as_accurate_as(linear(x.double(), weight), linear(x, weight.to(dtype)), got, atol=2e-5)


@pytest.mark.cuda
def test_factor_that_is_not_mixed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scheme = TensorScheme("shift", 2, 64, 1031 * 16)  # a prime above 1024: the interpreter takes minutes
    weight, tensors = stored(scheme, torch.device("cuda"))
    x = torch.randn(3, 1031 * 16).bfloat16()
    got = cuda.matmul_shift(x.cuda(), tensors, scheme).cpu()
    assert_as_accurate_as(linear(x.double(), weight), linear(x, weight.bfloat16()), got, atol=2e-5)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_product_of_decoded_panels(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = TensorScheme("shift", 3, 300, 112)  # rows rotated in blocks of 16: panels of 64 and a rest
    weight, tensors = stored(scheme, device)
    monkeypatch.setattr(cuda, "FUSED_TOKENS", 1)
    monkeypatch.setattr(cuda, "PANEL_WEIGHTS", 64 * 112)
    x = torch.randn(2, 3, 112).to(dtype)
    got = cuda.matmul_shift(x.to(device), tensors, scheme).cpu()
    assert_as_accurate_as(linear(x.double(), weight), linear(x, weight.to(dtype)), got, atol=2e-5)


@pytest.mark.slow
def test_product_with_the_weight_in_its_own_basis(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = TensorScheme("shift", 3, 300, 112)
    weight, tensors = stored(scheme, device)
    monkeypatch.setattr(cuda, "FUSED_TOKENS", 1)
    monkeypatch.setattr(cuda, "PLAIN_TOKENS", 6)
    monkeypatch.setattr(cuda, "DECODED_WEIGHTS", 64 * 112)
    x = torch.randn(2, 3, 112).to(BFLOAT16)
    assert cuda.way(6, BFLOAT16) == "plain"
    assert cuda.way(6, FLOAT16) == "dense"  # a weight may not fit float16
    got = cuda.matmul_shift(x.to(device), tensors, scheme).cpu()
    assert_as_accurate_as(linear(x.double(), weight), linear(x, weight.to(BFLOAT16)), got, atol=2e-5)


def test_input_side_rotated_in_parts(device: torch.device) -> None:
    scheme = TensorScheme("shift", 4, 32, 96, input_blocks=2)
    weight, tensors = stored(scheme, device)
    x = torch.randn(3, 96)
    got = cuda.matmul_shift(x.to(device), tensors, scheme).cpu()
    assert_as_accurate_as(linear(x.double(), weight), linear(x, weight.float()), got, atol=2e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_decoded_byte_sums_are_exact(bits: int, device: torch.device) -> None:
    codes = torch.randint(-(2**31), 2**31, (3, 5, 8 * bits)).int()
    sums = byte_sums()[states(codes, bits)].view(3, 5, 16, 16).transpose(1, 2).reshape(48, 80)
    got = shift_matmul.decoded(codes.to(device), bits, MULTIPLIER).cpu()
    assert torch.equal(got, (sums - 510).half())


@pytest.mark.parametrize("columns", [72, 11 * 16, 67 * 16])
def test_decoded_weight(columns: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "DECODED_WEIGHTS", 32 * 80)
    scheme = TensorScheme("shift", 4, 40, columns)
    weight, tensors = stored(scheme, device)
    got = cuda.decode_shift(tensors, scheme, FLOAT32).cpu()
    assert torch.allclose(got.double(), weight, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "bits"), [(300, 72, 4), (256, 48, 3), (5, 67 * 16, 2)])
def test_embedding(rows: int, columns: int, bits: int, device: torch.device) -> None:
    scheme = TensorScheme("shift", bits, rows, columns, seed=3)
    weight, tensors = stored(scheme, device)
    index = torch.tensor([[0, rows - 1, 2], [2, 0, rows // 2]])
    got = cuda.embedding_shift(index.to(device), tensors, scheme, FLOAT32).cpu()
    assert got.shape == (2, 3, columns)
    assert torch.allclose(got.double(), weight[index], atol=1e-5)
    assert cuda.embedding_shift(index[:0].to(device), tensors, scheme, BFLOAT16).shape == (0, 3, columns)


def test_rows_that_do_not_exist_are_nan(device: torch.device) -> None:
    scheme = TensorScheme("shift", 4, 20, 16)
    weight, tensors = stored(scheme, device)
    got = cuda.embedding_shift(torch.tensor([-1, 3, 20], device=device), tensors, scheme, FLOAT32).cpu()
    assert got[0].isnan().all()
    assert got[2].isnan().all()
    assert torch.allclose(got[1].double(), weight[3], atol=1e-5)


def test_inputs_that_are_not_contiguous(device: torch.device) -> None:
    scheme = TensorScheme("shift", 4, 48, 64)
    weight, tensors = stored(scheme, device)
    spread = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in tensors.items()}
    x = torch.randn(64, 3).T
    got = cuda.matmul_shift(x.to(device), spread, scheme).cpu()
    assert_as_accurate_as(linear(x.double(), weight), linear(x, weight.float()), got, atol=2e-5)


@pytest.mark.slow
def test_products_repeat_bit_by_bit(device: torch.device) -> None:
    scheme = TensorScheme("shift", 4, 144, 1024)
    _, tensors = stored(scheme, device)
    x = torch.randn(3, 1024, device=device)
    first = cuda.matmul_shift(x, tensors, scheme)
    for _ in range(3):
        assert torch.equal(cuda.matmul_shift(x, tensors, scheme), first)


@pytest.mark.parametrize(
    ("across", "tokens", "programs"),
    [(256, 1, 32), (256, 1, 8), (256, 1, 112), (896, 1, 32), (256, 16, 8), (256, 64, 32), (256, 64, 8)],
    ids=["q", "k", "gate", "down", "k-16-tokens", "q-64-tokens", "k-64-tokens"],
)
def test_shares_fill_the_device(across: int, tokens: int, programs: int) -> None:
    steps = -(-across // shift_matmul.ACROSS)
    shares = -(-steps // shift_matmul.steps_each(across, programs, programs * tokens, 132))
    assert shares * programs >= (0.9 if tokens <= 16 else 0.6) * 132


def test_shares_of_a_weight_that_fills_the_device_alone() -> None:
    assert shift_matmul.steps_each(256, 1002, 1002, 132) == 64


def test_extreme_activations(device: torch.device) -> None:
    scheme = TensorScheme("shift", 4, 16, 64)
    weight, tensors = stored(scheme, device)
    x = torch.randn(4, 64)
    x[0], x[1], x[2] = 0, x[1] * 1e-25, x[2] * 1e30
    got = cuda.matmul_shift(x.to(device), tensors, scheme).cpu()
    assert torch.equal(got[0], torch.zeros(16))
    exact = linear(x.double(), weight)
    for row in (1, 2, 3):
        assert_as_accurate_as(exact[row], linear(x, weight.float())[row], got[row], atol=2e-5)


def test_no_tokens(device: torch.device) -> None:
    scheme = TensorScheme("shift", 4, 16, 64)
    _, tensors = stored(scheme, device)
    assert cuda.matmul_shift(torch.zeros(0, 64, device=device), tensors, scheme).shape == (0, 16)


def test_table_takes_the_kernels_where_they_can_run() -> None:
    assert "matmul on cuda: cuda.matmul_shift" in dispatch.explain(TensorScheme("shift", 4, 32, 4096), "cuda")
    plain = dispatch.explain(TensorScheme("shift", 4, 32, 4096, incoherence=False), "cuda")
    assert "reference.matmul (cuda.matmul_shift covers weights with incoherence only)" in plain
    odd = dispatch.explain(TensorScheme("shift", 4, 32, 16 * 1009), "cuda")
    assert "matmul on cuda: cuda.matmul_shift" in odd
    assert "embedding on cuda: cuda.embedding_shift" in odd


@pytest.mark.cuda
def test_captured_into_a_graph() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scheme = TensorScheme("shift", 4, 256, 512)
    _, tensors = stored(scheme, torch.device("cuda"))
    x = torch.randn(1, 512, device="cuda", dtype=FLOAT16)
    ops.matmul(x, list(tensors.values()), scheme.key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.matmul(x, list(tensors.values()), scheme.key)
    x.copy_(torch.randn(1, 512))
    graph.replay()
    wanted = reference.matmul(x.float(), tensors, scheme)
    assert torch.allclose(y.float(), wanted, atol=2e-3 * float(wanted.abs().max()))
