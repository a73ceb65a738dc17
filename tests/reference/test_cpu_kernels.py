"""The compiled product of `shift` at every instruction set against float64 arithmetic on the decoded weight."""

import threading
from collections.abc import Iterator

import pytest
import torch
from helpers import assert_as_accurate_as, relative_error
from torch import Tensor
from torch.nn.functional import linear

from hf_hyper import _native, codec
from hf_hyper.errors import ConfigError, HyperError, ShapeError
from hf_hyper.hyperfunctions.shift import MULTIPLIER, byte_sums
from hf_hyper.kernels import cpu, ops
from hf_hyper.scheme import TILE, TensorScheme

pytestmark = pytest.mark.skipif(_native.load() is None, reason=f"no compiled core: {_native.unavailable_reason()}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = (1, 2, 3, 5, 16, 17, 64, 200)
INT8_ERROR = 0.012
"""Twice the relative error expected of 8 bits: largest of 16 Gaussians (1.8 to 2.1) / 127 / sqrt(12)."""
INT8_DENSE_ERROR = 0.02
"""The same for 256 columns (2.8 to 3.2), and byte sums of deviation 147 in steps of 4."""


@pytest.fixture(autouse=True)
def restored_activations() -> Iterator[None]:
    before = cpu.activations()
    cpu.set_activations("exact")
    yield
    cpu.set_activations(before)


def random_tensors(scheme: TensorScheme) -> dict[str, Tensor]:
    """Any bit string is a valid code, so nothing has to be encoded."""
    specs = codec.tensor_specs(scheme)
    return {
        "codes": torch.randint(-(2**31), 2**31, specs["codes"].shape).to(torch.int32),
        "scale": (torch.rand(specs["scale"].shape) + 0.5).half(),
        "out_scale": (torch.rand(specs["out_scale"].shape) + 0.5).bfloat16(),
    }


def check(scheme: TensorScheme, tokens: tuple[int, ...], dtypes: list[torch.dtype]) -> None:
    tensors = random_tensors(scheme)
    weight = codec.dequantize(tensors, scheme)
    for dtype in dtypes:
        for count in tokens:
            x = torch.randn(count, scheme.in_features).to(dtype)
            got = ops.matmul(x, list(tensors.values()), scheme.key)
            exact = linear(x.double(), weight.double())
            assert_as_accurate_as(exact, linear(x, weight.to(dtype)), got, atol=2e-5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 16), (172, 64), (130, 272)])
def test_matmul(rows: int, columns: int, bits: int, isa: str) -> None:
    check(TensorScheme("shift", float(bits), rows, columns), TOKENS, DTYPES)


def test_matmul_of_a_real_width(isa: str) -> None:
    check(TensorScheme("shift", 4.0, 576, 576), (1, 4, 40), DTYPES)


AWKWARD = [(576, 4), (16 * 1031, 1), (16 * 63 * 13, 1), (16 * 101, 1), *((32 * odd, 1) for odd in (3, 5, 7, 9, 15))]


@pytest.mark.parametrize(("columns", "blocks"), AWKWARD)
def test_rotations_of_awkward_widths(columns: int, blocks: int, isa: str) -> None:
    check(TensorScheme("shift", 2.0, 48, columns, input_blocks=blocks), (1, 20), [torch.float32])


def test_plan_is_made_wherever_tensors_are_made() -> None:
    """`from_pretrained` builds models inside such a region."""
    with torch.device("meta"):
        plan = cpu._plan.__wrapped__(TensorScheme("shift", 4.0, 64, 576))
    assert plan.padded_in == 576


@pytest.mark.parametrize(("columns", "blocks"), [*AWKWARD, (1, 1), (64, 1), (500, 1), (4096, 2)])
def test_sums_of_rotated_activations(columns: int, blocks: int) -> None:
    plan = cpu._plan(TensorScheme("shift", 2.0, 16, columns, input_blocks=blocks))
    for dtype in DTYPES:
        rotated, sums = _native.shift_rotate(plan, torch.randn(3, columns).to(dtype), torch.float32)
        torch.testing.assert_close(sums, rotated.double().sum(1).float(), rtol=0, atol=1e-6 * columns**0.5 * 4)


needs_dense = pytest.mark.skipif(
    _native.load() is None or _native.dense_tokens() == 0, reason="no dot products of bfloat16 pairs"
)


def to_bytes(rotated: Tensor) -> Tensor:
    """Activations in the basis of the codes, rounded to 8 bits per token and panel of up to 16 tiles."""
    tiles = rotated.shape[1] // TILE
    panels = -(-tiles // 16)
    parts = []
    for panel in range(panels):
        part = rotated[:, tiles * panel // panels * TILE : tiles * (panel + 1) // panels * TILE]
        largest = part.abs().amax(1, keepdim=True)
        factor = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)
        parts.append(largest / 127 * (part * factor).round())
    return torch.cat(parts, 1)


@needs_dense
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (172, 64), (130, 272), (48, 16 * 51), (80, 512)])
def test_dense_product(rows: int, columns: int, bits: int, int8: bool) -> None:
    check_dense(TensorScheme("shift", float(bits), rows, columns), (1, 3, 7, 40, 517), int8)


@needs_dense
@pytest.mark.parametrize("columns", [32, 576, 640, 768, 896, 960, 16 * 81, 2048, 4096])
def test_dense_product_of_other_widths(columns: int) -> None:
    check_dense(TensorScheme("shift", 4.0, 400, columns), (5, 40), int8=False)


@needs_dense
@pytest.mark.parametrize(
    "columns", [20, 32, 48, 64, 96, 128, 256, 352, 512, 576, 640, 768, 896, 960, 1536, 2048, 4096, 8192, 32 * 81]
)
def test_dense_product_of_bfloat16_tokens(columns: int) -> None:
    """They are rotated in another way than float32 ones: a few of them are rounded to the next number."""
    scheme = TensorScheme("shift", 4.0, 80, columns)
    tensors, plan = random_tensors(scheme), cpu._plan(scheme)
    for tokens in (1, 40):
        x = torch.randn(tokens, columns).bfloat16()
        got = _native.shift_matmul_dense(plan, *tensors.values(), x)
        wanted = _native.shift_matmul_dense(plan, *tensors.values(), x.float()).bfloat16()
        assert (got != wanted).double().mean() < 0.05, tokens
        assert (got - wanted).norm() < 1e-3 * wanted.norm(), tokens


@needs_dense
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("rows", [96, 192, 500])
def test_dense_product_of_larger_output_blocks(rows: int, bits: int, int8: bool) -> None:
    check_dense(TensorScheme("shift", float(bits), rows, 272), (5, 40), int8)


def check_dense(scheme: TensorScheme, counts: tuple[int, ...], int8: bool) -> None:
    """Against the same roundings, and sums in another order."""
    tensors = random_tensors(scheme)
    plan = cpu._plan(scheme)
    sums = torch.empty(scheme.padded_out, scheme.padded_in, dtype=torch.float32 if int8 else torch.bfloat16)
    _native.shift_decode_rows(plan, tensors["codes"], 0, scheme.padded_out // TILE, sums)
    if int8:  # quarters of byte sums, halves up, which are too large by an eighth on average
        sums = 4 * ((sums + 512).div(4, rounding_mode="floor") - 0.125) - 510
    for tokens in counts:
        x = torch.randn(tokens, scheme.in_features)
        rotated, totals = _native.shift_rotate(plan, x, torch.float32 if int8 else torch.bfloat16)
        if int8:
            rotated = to_bytes(rotated)
            totals = rotated.sum(1)
        wanted = torch.empty(tokens, scheme.out_features)
        size = x.norm() * scheme.out_features**0.5  # of a product with weights of deviation 1
        product = linear(rotated.double(), sums.double()).float()
        _native.shift_finish(plan, product, 0, totals, tensors["scale"], tensors["out_scale"], wanted)
        for threads in (1, 3):
            got = _native.shift_matmul_dense(plan, *tensors.values(), x, int8=int8, threads=threads)
            assert (got - wanted).norm() < 1e-5 * size, (tokens, threads)


def test_mean_of_byte_sums_in_quarters() -> None:
    """What the product in int8 takes off: a quarter of the mean, and an eighth for rounding halves up."""
    sums = byte_sums(MULTIPLIER)
    assert float(((sums + 2) // 4).double().mean()) == pytest.approx(float(sums.double().mean()) / 4 + 0.125, abs=1e-3)


@needs_dense
@pytest.mark.parametrize("columns", [272, 576])
def test_dense_product_in_int8_of_tokens_that_are_zero_tiny_or_not_finite(columns: int) -> None:
    scheme = TensorScheme("shift", 4.0, 64, columns)
    tensors = random_tensors(scheme)
    x = torch.randn(5, columns)
    x[0], x[1, 7], x[2, 7] = 0.0, float("nan"), float("inf")
    x[3] *= 1e-38
    got = _native.shift_matmul_dense(cpu._plan(scheme), *tensors.values(), x, int8=True)
    assert torch.equal(got[[0, 3]], torch.zeros(2, 64))
    assert not got[1:3].isfinite().any()
    wanted = linear(x[4].double(), codec.dequantize(tensors, scheme).double())
    assert 1e-3 < relative_error(got[4], wanted) < INT8_DENSE_ERROR


@needs_dense
@pytest.mark.parametrize("columns", [272, 1200])
@pytest.mark.parametrize("rows", [48, 1600])
@pytest.mark.parametrize("tokens", [1, 40, 200, 515, 1030])
def test_dense_result_does_not_depend_on_threads(rows: int, columns: int, tokens: int) -> None:
    """Threads share the rows, or the tokens where rows are few; a last part of a few tokens would add up otherwise."""
    scheme = TensorScheme("shift", 4.0, rows, columns)
    tensors = random_tensors(scheme)
    plan = cpu._plan(scheme)
    x = torch.randn(tokens, columns).bfloat16()
    for int8 in (False, True):
        alone, *shared = (
            _native.shift_matmul_dense(plan, *tensors.values(), x, int8=int8, threads=threads)
            for threads in (1, 2, 3, 7)
        )
        assert all(torch.equal(alone, other) for other in shared)


@needs_dense
def test_dense_product_is_taken_for_bfloat16() -> None:
    scheme = TensorScheme("shift", 4.0, 64, 576)
    for tokens, way in ((1, "fused"), (4, "fused"), (5, "dense"), (64, "dense")):
        assert cpu.way(tokens, torch.bfloat16, scheme) == (way, "exact")
    assert cpu.way(16, torch.float32, scheme) == ("fused", "exact")
    assert cpu.way(17, torch.float32, scheme) == ("panels", "exact")
    check(scheme, (5, 64, 600), [torch.bfloat16])


@needs_dense
def test_dense_product_in_int8_is_taken_for_coarse_codes_of_wide_weights() -> None:
    cpu.set_activations("int8")
    wide, fine, narrow = (
        TensorScheme("shift", bits, 64, columns) for bits, columns in ((4.0, 576), (5.0, 576), (4.0, 256))
    )
    for dtype in DTYPES:
        assert [cpu.way(tokens, dtype, wide) for tokens in (1, 5, 64)] == [("fused", "int8")] + [("dense", "int8")] * 2
        assert [cpu.way(tokens, dtype, wide) for tokens in (2, 4)] == [("fused", "exact")] * 2
        assert cpu.way(64, dtype, narrow) == ("panels", "exact")
    assert [cpu.way(tokens, torch.bfloat16, fine) for tokens in (4, 5)] == [("fused", "exact"), ("dense", "exact")]
    assert cpu.way(64, torch.float32, fine) == ("panels", "exact")


@pytest.mark.parametrize("bits", [1, 4, 5, 8])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 11])
def test_int8_activations(tokens: int, bits: int, isa: str) -> None:
    scheme = TensorScheme("shift", float(bits), 172, 576)
    tensors = random_tensors(scheme)
    x = torch.randn(tokens, 576)
    x[0] *= 1e6
    wanted = linear(x.double(), codec.dequantize(tensors, scheme).double())
    cpu.set_activations("int8")
    got = ops.matmul(x, list(tensors.values()), scheme.key)
    if cpu.way(tokens, x.dtype, scheme)[0] == "dense":
        limits = 1e-3, INT8_DENSE_ERROR
    else:
        limits = (1e-3, INT8_ERROR) if tokens == 1 else (0.0, 1e-6)  # float32 stays where tokens are several
    for i in range(tokens):
        assert limits[0] < relative_error(got[i], wanted[i]) < limits[1]


@pytest.mark.parametrize("bits", [1, 4, 5, 8])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 11])
def test_rounding_to_16_bits_loses_nothing_that_float16_holds(tokens: int, bits: int, isa: str) -> None:
    scheme = TensorScheme("shift", float(bits), 1300, 576)
    tensors = random_tensors(scheme)
    x = torch.randn(tokens, 576).half()
    x[:, :3] *= 30
    wanted = linear(x.double(), codec.dequantize(tensors, scheme).double())
    got = _native.shift_matmul(cpu._plan(scheme), *tensors.values(), x)
    # 2e-5 beside the 2e-4 of the result in float16 is half a percent of it.
    assert relative_error(got, wanted) < 1.03 * relative_error(wanted.half(), wanted)
    for i in range(tokens if _native.matmul_isa() != "scalar" else 0):  # there floats, in an order by number of tokens
        assert torch.equal(got[i : i + 1], _native.shift_matmul(cpu._plan(scheme), *tensors.values(), x[i : i + 1]))


@pytest.mark.parametrize("tokens", [1, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_are_not_finite_stay_so_and_leave_others_alone(dtype: torch.dtype, tokens: int, isa: str) -> None:
    scheme = TensorScheme("shift", 3.0, 64, 272)
    tensors = random_tensors(scheme)
    x = torch.randn(tokens, 272).to(dtype)
    for int8 in (False, True):
        clean = _native.shift_matmul(cpu._plan(scheme), *tensors.values(), x, int8=int8)
        for value in (float("nan"), float("inf"), -float("inf")):
            broken = x.clone()
            broken[tokens // 2, 100] = value
            got = _native.shift_matmul(cpu._plan(scheme), *tensors.values(), broken, int8=int8)
            assert not got[tokens // 2].isfinite().any()
            kept = torch.arange(tokens) != tokens // 2
            assert torch.equal(got[kept], clean[kept])


@pytest.mark.parametrize("tokens", [1, 20])
def test_large_numbers_stay_finite_and_zeros_stay_zero(tokens: int, isa: str) -> None:
    scheme = TensorScheme("shift", 3.0, 32, 100)
    tensors = list(random_tensors(scheme).values())
    for accuracy in cpu.ACTIVATIONS:
        cpu.set_activations(accuracy)
        for dtype, largest in ((torch.float16, 100.0), (torch.bfloat16, 1e30), (torch.float32, 1e30)):
            x = torch.full((tokens, 100), largest, dtype=dtype)
            assert ops.matmul(x, tensors, scheme.key).isfinite().all()
        zero = ops.matmul(torch.zeros(tokens, 100), tensors, scheme.key)
        assert torch.equal(zero, torch.zeros(tokens, 32))


def test_float16_rounds_like_torch(isa: str) -> None:
    """A 1 x 1 weight carries any number through the conversions; torch rounds the float32 result the same way.

    Where activations keep 16 bits the result before rounding differs in the last bits of float32, and a few near a tie
    are rounded to the neighbour.
    """
    scheme = TensorScheme("shift", 4.0, 1, 1)
    tensors = list(random_tensors(scheme).values())
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()].unsqueeze(1)
    for dtype in (torch.float16, torch.bfloat16):
        narrow = torch.cat([ops.matmul(part.to(dtype), tensors, scheme.key) for part in x.split(16)])
        wide = torch.cat([ops.matmul(part.to(dtype).float(), tensors, scheme.key) for part in x.split(16)])
        if _native.matmul_isa() == "scalar":
            assert torch.equal(narrow, wide.to(dtype))
        apart = (narrow.view(torch.int16).int() - wide.to(dtype).view(torch.int16).int()).abs()
        assert apart.max() <= 1
        assert apart.float().mean() < 0.002


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_shapes_strides_and_inference_mode(tokens: int) -> None:
    scheme = TensorScheme("shift", 4.0, 130, 272)
    tensors = list(random_tensors(scheme).values())
    x = torch.randn(272, tokens).T
    with torch.inference_mode():
        got = ops.matmul(x, tensors, scheme.key)
    assert got.shape == (tokens, 130)
    assert torch.equal(got, ops.matmul(x.contiguous(), tensors, scheme.key))
    stacked = ops.matmul(x.reshape(1, tokens, 1, 272), tensors, scheme.key)
    assert torch.equal(stacked, got.view(1, tokens, 1, 130))


@pytest.mark.parametrize("rows", [192, 576])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_threads(rows: int, tokens: int, dtype: torch.dtype) -> None:
    scheme = TensorScheme("shift", 4.0, rows, 576)
    tensors = random_tensors(scheme)
    x = torch.randn(tokens, 576).to(dtype)
    plan = cpu._plan(scheme)
    alone, several = (
        _native.shift_matmul(plan, tensors["codes"], tensors["scale"], tensors["out_scale"], x, threads=threads)
        for threads in (1, 3)
    )
    assert torch.equal(alone, several)


def test_two_callers_at_once() -> None:
    scheme = TensorScheme("shift", 4.0, 576, 576)
    tensors = list(random_tensors(scheme).values())
    x = torch.randn(2, 5, 576)
    wanted = [ops.matmul(part, tensors, scheme.key) for part in x]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(50):
            if not torch.allclose(ops.matmul(x[i], tensors, scheme.key), wanted[i], rtol=1e-5, atol=1e-4):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.parametrize("bits", range(1, 9))
def test_decoded_rows_are_the_byte_sums(bits: int, isa: str) -> None:
    scheme = TensorScheme("shift", float(bits), 48, 272)
    tensors = random_tensors(scheme)
    plan = cpu._plan(scheme)
    tiles = _native.shift_decode(tensors["codes"].view(-1, 8 * bits), bits, plan.multiplier)
    wanted = tiles.view(3, 17, TILE, TILE).transpose(1, 2).reshape(48, 272) / plan.inverse_deviation + plan.mean_offset
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.empty(32, 272, dtype=dtype)
        _native.shift_decode_rows(plan, tensors["codes"], 1, 2, rows)
        assert torch.equal(rows, wanted.round()[16:].to(dtype))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns", "blocks"), [(1, 1, 1), (172, 64, 1), (130, 270, 1), (576, 576, 4)])
def test_decoded_weight(rows: int, columns: int, blocks: int, bits: int, isa: str) -> None:
    check_weight(TensorScheme("shift", float(bits), rows, columns, input_blocks=blocks))


@pytest.mark.parametrize("columns", [576, 1536, 8192 + 16, 16 * 1031, 16 * 63 * 13, 16 * 101])
def test_decoded_weight_of_awkward_widths(columns: int, isa: str) -> None:
    check_weight(TensorScheme("shift", 2.0, 300, columns))


def check_weight(scheme: TensorScheme) -> None:
    tensors = random_tensors(scheme)
    wanted = codec.dequantize(tensors, scheme)
    for dtype in (*DTYPES, torch.float64):
        got = cpu.decode_shift(tensors, scheme, dtype)
        assert got.is_contiguous()
        assert_as_accurate_as(
            wanted, wanted.to(dtype), got, atol=2e-5
        )  # float32 sums in another order, which may cancel


def test_decoded_weight_does_not_depend_on_threads() -> None:
    scheme = TensorScheme("shift", 3.0, 300, 576)
    tensors = random_tensors(scheme)
    alone, several = torch.empty(300, 576), torch.empty(300, 576)
    for threads, weight in ((1, alone), (3, several)):
        _native.shift_decode_weight(cpu._plan(scheme), *tensors.values(), weight, threads=threads)
    assert torch.equal(alone, several)


def test_decoded_weight_is_limited_to_finite_numbers(isa: str) -> None:
    scheme = TensorScheme("shift", 4.0, 32, 272)
    tensors = random_tensors(scheme)
    tensors["out_scale"].fill_(torch.finfo(torch.bfloat16).max)
    got = cpu.decode_shift(tensors, scheme, torch.float32)
    assert got.isfinite().all()
    assert got.abs().max() == torch.finfo(torch.float32).max


@pytest.mark.skipif(_native.load() is None, reason="no compiled core")
def test_plans_with_even_factors_are_refused() -> None:
    """Runs of a power of two would reach into the next part of the width."""
    scheme = TensorScheme("shift", 4.0, 48, 96)
    plan = cpu._plan.__wrapped__(scheme)
    assert plan.factors[0] == 3
    plan.factors[0] = 2
    with pytest.raises(HyperError, match="shift_matmul"):
        _native.shift_matmul(plan, *random_tensors(scheme).values(), torch.randn(1, 96))


def test_wrong_tensors_are_refused() -> None:
    scheme = TensorScheme("shift", 4.0, 48, 272)
    tensors = random_tensors(scheme)
    plan = cpu._plan(scheme)
    x = torch.randn(1, 272)
    with pytest.raises(ShapeError, match=r"codes: got shape \[3, 16, 32\], wanted \[3, 17, 32\]"):
        _native.shift_matmul(plan, tensors["codes"][:, :16], tensors["scale"], tensors["out_scale"], x)
    with pytest.raises(ConfigError, match=r"scale: got torch.float32 on cpu, wanted torch.float16 on cpu"):
        _native.shift_matmul(plan, tensors["codes"], tensors["scale"].float(), tensors["out_scale"], x)
    with pytest.raises(ShapeError, match=r"x: got shape \[1, 271\], wanted \[tokens, 272\]"):
        _native.shift_matmul(plan, tensors["codes"], tensors["scale"], tensors["out_scale"], x[:, 1:])
    with pytest.raises(ShapeError, match=r"weight: got shape \[48, 271\], wanted \[48, 272\]"):
        _native.shift_decode_weight(plan, *tensors.values(), torch.empty(48, 271))
    with pytest.raises(ConfigError, match=r"weight: got strides \(1, 48\), wanted a contiguous tensor"):
        _native.shift_decode_weight(plan, *tensors.values(), torch.empty(272, 48).T)
    with pytest.raises(ConfigError, match="set_activations: got 'int4', wanted one of exact, int8"):
        cpu.set_activations("int4")


def test_subnormal_scales_survive_flushing() -> None:
    scheme = TensorScheme("shift", 4.0, 16, 16)
    tensors = random_tensors(scheme)
    tensors["scale"].fill_(2.0**-22)
    x = torch.randn(1, 16)
    wanted = ops.matmul(x, list(tensors.values()), scheme.key)
    assert wanted.abs().max() > 0
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        assert torch.equal(ops.matmul(x, list(tensors.values()), scheme.key), wanted)
        assert torch.equal(ops.matmul(x.half(), list(tensors.values()), scheme.key).float() != 0, wanted.half() != 0)
    finally:
        torch.set_flush_denormal(False)
