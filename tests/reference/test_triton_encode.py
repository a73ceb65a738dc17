"""The search on GPUs: the same bytes as the compiled core, under the interpreter or on a CUDA device."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device and no TRITON_INTERPRET=1", allow_module_level=True)

from hf_hyper import _native
from hf_hyper._triton.shift_encode import full_search
from hf_hyper.encoders.shift import encode_tiles
from hf_hyper.encoders.viterbi import encode_tiles_reference
from hf_hyper.hyperfunctions.shift import MULTIPLIER


def tiles_with_outliers(count: int) -> torch.Tensor:
    """Gaussian tiles in which some weights lie beyond the ends of the code."""
    tiles = torch.randn(count, 256)
    tiles[0, 3], tiles[0, 250], tiles[-1, 0] = -5.5, 4.9, 7.0
    return tiles


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: tensors of the CPU under the interpreter, or a CUDA device."""
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("no CUDA device" if request.param == "cuda" else "a CUDA device is there to compile for")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.mark.parametrize("bits", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_same_bytes_as_the_compiled_core(bits: int, device: torch.device) -> None:
    tiles = tiles_with_outliers(1)
    got = encode_tiles_reference(tiles.to(device), bits, 16, MULTIPLIER, full_search).cpu()
    assert torch.equal(got, _native.shift_encode(tiles, bits, 16, MULTIPLIER))


@pytest.mark.cuda
@pytest.mark.parametrize("bits", range(1, 9))
def test_tensors_on_a_device_are_searched_there(bits: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tiles = tiles_with_outliers(300)
    got = encode_tiles(tiles.cuda(), bits, "fast")
    assert got.is_cuda
    assert torch.equal(got.cpu(), encode_tiles(tiles, bits, "best"))
