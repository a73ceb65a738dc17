"""Tensors compressed side by side: everything once, the same bytes, errors that arrive."""

import threading

import pytest
import torch
from torch import nn

from hf_hyper import HyperConfig, ShapeError, compress_module
from hf_hyper.pipeline.workers import side_by_side


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [None, 1, 2, 3, 100])
def test_everything_is_done_once(workers: int | None) -> None:
    sizes = {f"{i}": i + 1 for i in range(20)}
    assert sorted(side_by_side(sizes, int, workers)) == list(range(20))
    assert torch.get_num_threads() == 2


def test_nothing_to_do() -> None:
    assert list(side_by_side({}, str)) == []


def test_a_large_tensor_goes_first_with_all_threads() -> None:
    seen = []

    def work(name: str) -> None:
        seen.append((name, torch.get_num_threads(), threading.current_thread() is threading.main_thread()))

    list(side_by_side({"a": 1, "large": 100, "b": 2, "c": 3}, work, 2))
    assert seen[0] == ("large", 2, True)
    assert sorted(seen[1:]) == [(name, 1, False) for name in "abc"]


def test_an_error_arrives_and_the_threads_are_restored() -> None:
    def work(name: str) -> None:
        if name == "7":
            raise ValueError(name)

    with pytest.raises(ValueError, match="7"):
        list(side_by_side({f"{i}": 1 for i in range(20)}, work, 2))
    assert torch.get_num_threads() == 2


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 48, 3), nn.Conv2d(48, 48, 3, groups=48), nn.Linear(512, 96), nn.Linear(96, 200), nn.Linear(80, 80)
    )


OPTIONS = [
    {"bits": 4},
    {"bits": 3.5, "effort": "best"},
    {"bits": 5.3, "hyperfunction": "winding", "effort": "fast"},
    {"bits": 3, "hyperfunction": "winding", "winding": {"dimension": 3, "incoherence": True}, "effort": "fast"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_bytes_for_any_number_of_workers(options: dict) -> None:
    config = HyperConfig(**options)
    one = compress_module(net(), config, workers=1)
    for workers in (2, 5):
        other = compress_module(net(), config, workers=workers)
        ours, theirs = (module.hyper_config for module in (other, one))
        assert isinstance(ours, HyperConfig) and isinstance(theirs, HyperConfig)
        assert list(ours.tensor_schemes) == list(theirs.tensor_schemes)
        assert ours.to_dict() == theirs.to_dict()
        assert other.state_dict().keys() == one.state_dict().keys()
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_weight_that_is_not_finite_is_named() -> None:
    broken = net()
    broken[3].get_parameter("weight").data[5, 6] = float("nan")
    with pytest.raises(ShapeError, match=r"3: nan at row 5, column 6"):
        compress_module(broken, HyperConfig(bits=4), workers=2)
