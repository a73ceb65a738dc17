import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from hf_hyper import _native
from hf_hyper.encoders.viterbi import encode_tiles_reference
from hf_hyper.errors import ConfigError, ShapeError
from hf_hyper.hyperfunctions.shift import MULTIPLIER, byte_sums, states, values

pytestmark = pytest.mark.skipif(_native.load() is None, reason=f"no compiled core: {_native.unavailable_reason()}")


@pytest.fixture
def restored_isa() -> Iterator[None]:
    before = _native.isa()
    yield
    _native.set_isa(before or "auto")


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """The reference makes thousands of small calls, which on a busy machine mostly wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_codes(n: int, bits: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (n, 8 * bits)).to(torch.int32)


@pytest.mark.parametrize("bits", range(1, 9))
def test_decode_is_the_value_of_every_circular_window(bits: int) -> None:
    codes = random_codes(3, bits)
    decoded = _native.shift_decode(codes, bits, MULTIPLIER)
    assert torch.equal(decoded, values(codes.device)[states(codes, bits)])


@pytest.mark.parametrize("bits", range(1, 9))
def test_orbit_points_encode_without_error(bits: int) -> None:
    tiles = _native.shift_decode(random_codes(2, bits), bits, MULTIPLIER)
    again = _native.shift_encode(tiles, bits, 16, MULTIPLIER)
    assert torch.equal(_native.shift_decode(again, bits, MULTIPLIER), tiles)


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize(("bits", "survivor_bits"), [(1, 9), (3, 11), (3, 16), (4, 12), (4, 16), (6, 13), (8, 16)])
def test_bytes_are_those_of_the_reference(bits: int, survivor_bits: int) -> None:
    tiles = torch.randn(1, 256) * 1.3
    expected = encode_tiles_reference(tiles, bits, survivor_bits, MULTIPLIER)
    assert torch.equal(_native.shift_encode(tiles, bits, survivor_bits, MULTIPLIER), expected)


@pytest.mark.usefixtures("one_torch_thread")
def test_tails_are_mended_as_in_the_reference() -> None:
    tiles = torch.randn(1, 256)
    tiles[0, 10:12] = torch.tensor([3.25, -3.2])  # farther from any branch than the finest scale can tell
    expected = encode_tiles_reference(tiles, 8, 16, MULTIPLIER)
    assert torch.equal(_native.shift_encode(tiles, 8, 16, MULTIPLIER), expected)
    decoded = _native.shift_decode(expected, 8, MULTIPLIER)
    assert (decoded - tiles).abs().max() < 0.5


@pytest.mark.parametrize(("bits", "survivor_bits"), [(1, 10), (2, 12), (3, 16), (4, 14), (4, 16), (5, 12), (8, 16)])
@pytest.mark.usefixtures("restored_isa")
def test_bytes_do_not_depend_on_threads_or_instruction_set(bits: int, survivor_bits: int) -> None:
    tiles = torch.randn(3, 256)
    expected = _native.shift_encode(tiles, bits, survivor_bits, MULTIPLIER, threads=1)
    for isa in _native.available_isas():
        _native.set_isa(isa)
        assert _native.isa() == isa
        count = 1 if isa == "scalar" else 3
        part = _native.shift_encode(tiles[:count], bits, survivor_bits, MULTIPLIER, threads=count)
        assert torch.equal(part, expected[:count]), isa


def test_every_value_depends_on_the_ring() -> None:
    tiles = torch.randn(4, 256)
    codes = _native.shift_encode(tiles, 4, 16, MULTIPLIER)
    turned = torch.cat([codes[:, 2:], codes[:, :2]], 1)  # 16 symbols further
    decoded, ahead = (_native.shift_decode(c, 4, MULTIPLIER) for c in (codes, turned))
    assert torch.equal(ahead, decoded.roll(-16, 1))
    error = (decoded - tiles).square().mean(0)
    assert error[:4].mean() < 0.02 > error[-4:].mean()  # 0.0047 on average; 0.5 and more if the ring stayed open


def test_more_effort_and_more_bits_lower_the_error() -> None:
    tiles = torch.randn(16, 256)

    def error(bits: int, survivor_bits: int) -> float:
        codes = _native.shift_encode(tiles, bits, survivor_bits, MULTIPLIER)
        return float((_native.shift_decode(codes, bits, MULTIPLIER) - tiles).square().mean())

    assert error(4, 8) > error(4, 10) > error(4, 12) > error(4, 16)
    assert error(2, 10) > error(3, 10) > error(4, 10)


def test_table_of_an_observable_gives_the_bytes_of_its_multiplier() -> None:
    tiles = torch.randn(2, 256)
    expected = _native.shift_encode(tiles, 3, 12, MULTIPLIER)
    assert torch.equal(_native.shift_encode_observable(tiles, 3, 12, byte_sums()), expected)


def test_no_tiles_and_foreign_layouts() -> None:
    assert _native.shift_encode(torch.empty(0, 256), 3, 12, MULTIPLIER).shape == (0, 24)
    assert _native.shift_decode(torch.empty(0, 24, dtype=torch.int32), 3, MULTIPLIER).shape == (0, 256)
    tiles = torch.randn(256, 2, dtype=torch.float64)
    expected = _native.shift_encode(tiles.T.contiguous().float(), 4, 10, MULTIPLIER)
    assert torch.equal(_native.shift_encode(tiles.T, 4, 10, MULTIPLIER), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    tiles = torch.zeros(2, 256)
    tiles[1, 255] = value
    with pytest.raises(ConfigError, match="NaN or infinity"):
        _native.shift_encode(tiles, 4, 12, MULTIPLIER)
    with pytest.raises(ConfigError, match="NaN or infinity"):
        encode_tiles_reference(tiles, 4, 12, MULTIPLIER)


def test_wrong_arguments_name_the_value() -> None:
    tiles = torch.zeros(1, 256)
    with pytest.raises(ConfigError, match=r"bits: got 9, wanted 1\.\.8"):
        _native.shift_encode(tiles, 9, 12, MULTIPLIER)
    with pytest.raises(ConfigError, match=r"survivor_bits: got 7, wanted 8\.\.16"):
        _native.shift_encode(tiles, 4, 7, MULTIPLIER)
    with pytest.raises(ConfigError, match="multiplier: got 2"):
        _native.shift_encode(tiles, 4, 12, 2)
    with pytest.raises(ConfigError, match="threads: got 0"):
        _native.shift_encode(tiles, 4, 12, MULTIPLIER, threads=0)
    with pytest.raises(ShapeError, match=r"tiles: got shape \[256\]"):
        _native.shift_encode(tiles[0], 4, 12, MULTIPLIER)
    with pytest.raises(ShapeError, match=r"codes: got shape \[1, 8\], wanted \[n, 32\]"):
        _native.shift_decode(torch.zeros(1, 8, dtype=torch.int32), 4, MULTIPLIER)
    with pytest.raises(ConfigError, match=r"wanted torch\.int32"):
        _native.shift_decode(torch.zeros(1, 32), 4, MULTIPLIER)
    with pytest.raises(ConfigError, match="set_isa: got 'mmx'"):
        _native.set_isa("mmx")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_threads_survive_a_fork() -> None:
    script = (
        "import ctypes, os, sys\n"
        "core = ctypes.CDLL(sys.argv[1])\n"
        "tiles, codes = (ctypes.c_float * 2048)(*range(2048)), (ctypes.c_uint32 * 256)()\n"
        "run = lambda: core.hyper_shift_encode(tiles, ctypes.c_int64(8), 4, 8, ctypes.c_uint32(2212286765), 3, codes)\n"
        "assert run() == 0\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(run())\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert run() == 0\n"
    )
    library = _native.load()
    assert library is not None
    subprocess.run([sys.executable, "-c", script, library._name], check=True, timeout=60)


def test_environment_switches_the_core_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HYPER_ISA", "off")
    _native.find.cache_clear()
    try:
        assert _native.load() is None
        assert _native.isa() is None
        assert _native.unavailable_reason() == "HF_HYPER_ISA=off switches the compiled core off"
    finally:
        monkeypatch.undo()
        _native.find.cache_clear()
    assert _native.load() is not None
