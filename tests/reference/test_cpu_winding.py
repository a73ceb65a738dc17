"""The compiled decoder and product of `winding` at every instruction set against the torch reference."""

import pytest
import torch
from helpers import assert_as_accurate_as, relative_error
from torch import Tensor
from torch.nn.functional import linear

from hf_hyper import _native, codec, hyperfunctions
from hf_hyper.errors import ConfigError, ShapeError
from hf_hyper.kernels import cpu_winding, ops, reference
from hf_hyper.kernels.dispatch import explain
from hf_hyper.scheme import TensorScheme

pytestmark = pytest.mark.skipif(_native.load() is None, reason=f"no compiled core: {_native.unavailable_reason()}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 33), (33, 513)]
PAPER = (6.5, {"num_points": 1600, "num_shells": 3, "direction": "lattice"})
RATES = [(1.0, {"num_shells": 1}), (2.5, {}), (4.0, {}), PAPER, (6.0, {"num_shells": 20}), (8.0, {}), (11.0, {})]


def stored(rows: int, columns: int, bits: float = 4.0, **options: object) -> tuple[TensorScheme, dict[str, Tensor]]:
    """A scheme and random tensors: any bit string reads as codes, those beyond the last shell included."""
    rate, constants = hyperfunctions.get("winding").resolve(bits, options)
    scheme = TensorScheme("winding", rate, rows, columns, incoherence=False, options=constants)
    specs = codec.tensor_specs(scheme)
    return scheme, {
        "codes": torch.randint(-(2**31), 2**31, specs["codes"].shape).to(torch.int32),
        "centre": torch.randn(2) * 0.01,
        "shell_side": torch.rand(specs["shell_side"].shape).sort().values + 0.1,
    }


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("bits", "options"), RATES, ids=str)
def test_decoded_weights_are_those_of_the_reference(
    bits: float, options: dict[str, object], rows: int, columns: int, isa: str
) -> None:
    scheme, tensors = stored(rows, columns, bits, **options)
    for dtype in DTYPES:
        got = cpu_winding.decode_winding(tensors, scheme, dtype)
        assert torch.equal(got, reference.decode(tensors, scheme, dtype))


def test_every_code_of_the_paper_decodes_alike(isa: str) -> None:
    scheme, tensors = stored(1, 2 << 13, *PAPER[:1], **PAPER[1])
    place = torch.arange(13 << 13)
    bits = (place // 13) >> (12 - place % 13) & 1
    weights = 1 << torch.arange(31, -1, -1)
    tensors["codes"] = (bits.view(-1, 32) * weights).sum(1).to(torch.int32).unsqueeze(0)
    got = cpu_winding.decode_winding(tensors, scheme, torch.float32)
    assert torch.equal(got, reference.decode(tensors, scheme, torch.float32))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("bits", "options"), RATES, ids=str)
def test_matmul(bits: float, options: dict[str, object], rows: int, columns: int, isa: str) -> None:
    scheme, tensors = stored(rows, columns, bits, **options)
    weight = codec.dequantize(tensors, scheme)
    for dtype in DTYPES:
        for count in (1, 2, 3, 8, 40):
            x = torch.randn(count, columns).to(dtype)
            got = ops.matmul(x, list(tensors.values()), scheme.key)
            exact = linear(x.double(), weight.double())
            assert_as_accurate_as(exact, linear(x, weight.to(dtype)), got, atol=2e-5)


@pytest.mark.parametrize("tokens", [0, 1, 6, 17, 40])
def test_shapes_strides_threads_and_inference_mode(tokens: int) -> None:
    scheme, tensors = stored(130, 273)
    x = torch.randn(273, tokens).T
    with torch.inference_mode():
        got = ops.matmul(x, list(tensors.values()), scheme.key)
    assert got.shape == (tokens, 130)
    assert torch.allclose(got, reference.matmul(x, tensors, scheme), rtol=1e-4, atol=1e-4)
    plan = cpu_winding._plan(scheme)
    alone, several = (_native.winding_matmul(plan, *tensors.values(), x, threads=threads) for threads in (1, 3))
    assert torch.equal(alone, several)


@pytest.mark.skipif(_native.load() is None or _native.dense_tokens() == 0, reason="no dot products of bfloat16 pairs")
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 513), (130, 273), (64, 1088)])
@pytest.mark.parametrize(("bits", "options"), [(2.5, {}), PAPER, (6.0, {"num_shells": 20}), (11.0, {})], ids=str)
def test_dense_product(bits: float, options: dict[str, object], rows: int, columns: int) -> None:
    scheme, tensors = stored(rows, columns, bits, **options)
    plan = cpu_winding._plan(scheme)
    weight = cpu_winding.decode_winding(tensors, scheme, torch.bfloat16).float()
    for tokens in (1, 2, 13, 517):
        x = torch.randn(tokens, columns)
        wanted = linear(x.bfloat16().float(), weight)  # the same roundings, sums in another order
        got, several = (_native.winding_matmul_dense(plan, *tensors.values(), x, threads=t) for t in (1, 3))
        assert relative_error(got, wanted) < 1e-5, tokens
        assert torch.equal(got, several), tokens


def test_dense_product_is_taken_for_bfloat16() -> None:
    dense = "dense" if _native.dense_tokens() else "fused"
    assert [cpu_winding.way(tokens, torch.bfloat16) for tokens in (1, 4, 5)] == ["fused", "fused", dense]
    assert [cpu_winding.way(tokens, torch.float32) for tokens in (8, 9)] == ["fused", "panels"]


def test_weights_beyond_float16_multiply_small_activations() -> None:
    scheme, tensors = stored(5, 64)
    tensors["shell_side"] = tensors["shell_side"] * 1e6
    x = (torch.randn(40, 64) * 1e-5).half()
    for count in (1, 40):
        got = ops.matmul(x[:count], list(tensors.values()), scheme.key)
        assert torch.allclose(got, reference.matmul(x[:count], tensors, scheme), rtol=2e-3, atol=2e-3)


def test_panels_join(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, tensors = stored(37, 64)
    x = torch.randn(40, 64)
    whole = ops.matmul(x, list(tensors.values()), scheme.key)
    monkeypatch.setattr(cpu_winding, "PANEL_WEIGHTS", 64 * 5)
    assert torch.allclose(ops.matmul(x, list(tensors.values()), scheme.key), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"dimension": 3}, {"group_size": 32}], ids=str)
def test_other_members_of_the_family_take_the_reference(options: dict[str, int]) -> None:
    rate, constants = hyperfunctions.get("winding").resolve(4.0, options)
    scheme = TensorScheme("winding", rate, 20, 96, incoherence=False, options=constants)
    tensors = codec.quantize(torch.randn(20, 96), scheme, "fast")
    assert "covers pairs of weights without group scales only" in explain(scheme)
    x = torch.randn(3, 96)
    assert torch.equal(ops.matmul(x, list(tensors.values()), scheme.key), reference.matmul(x, tensors, scheme))


def test_explain_names_the_kernel_and_its_limit() -> None:
    scheme, _ = stored(32, 32)
    assert "matmul on cpu: cpu.matmul_winding" in explain(scheme)
    rotated = TensorScheme("winding", scheme.bits, 32, 32, incoherence=True, options=scheme.options)
    assert "matmul on cpu: reference.matmul (cpu.matmul_winding covers weights without incoherence" in explain(rotated)
    long, _ = stored(32, 32, 12.0)
    assert "reference.decode (cpu.decode_winding covers codes of at most 22 bits" in explain(long)


def test_wrong_tensors_are_refused() -> None:
    scheme, tensors = stored(32, 32)
    plan, (codes, centre, shell_side) = cpu_winding._plan(scheme), tensors.values()
    x = torch.randn(1, 32)
    with pytest.raises(ShapeError, match=r"codes: got shape \[31, 4\], wanted \[32, 4\]"):
        _native.winding_matmul(plan, codes[:31], centre, shell_side, x)
    with pytest.raises(ShapeError, match=r"shell_side: got shape \[3\], wanted \[4\]"):
        _native.winding_matmul(plan, codes, centre, shell_side[1:], x)
    with pytest.raises(ConfigError, match=r"centre: got torch.float64 on cpu, wanted torch.float32 on cpu"):
        _native.winding_matmul(plan, codes, centre.double(), shell_side, x)
    with pytest.raises(ConfigError, match=r"rows: got 32, wanted 0..31"):
        _native.winding_decode(plan, codes, centre, shell_side, 1, torch.empty(32, 32))
