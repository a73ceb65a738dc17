"""`winding` at the settings of arXiv 2409.00592 against the released code's steps."""

import numpy as np
import pytest
import torch
from helpers import winding_codes, winding_scheme
from torch import Tensor

from hf_hyper.encoders import encode
from hf_hyper.encoders.halving import nearest_brute_force
from hf_hyper.hyperfunctions.winding import nodes
from hf_hyper.scheme import TensorScheme

CPU = torch.device("cpu")
PAPER = {"num_points": 1600, "num_shells": 3, "box_side": 0.1, "direction": "lattice"}


def paper_reference(weight: Tensor, of: TensorScheme) -> tuple[Tensor, Tensor]:
    """Code and node distance of every pair, by the released code's steps in float64 with a KD-tree."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    shells_count, side, unit = of.option("num_shells"), 0.1, nodes(of, CPU).double().numpy()
    pairs = weight.double().numpy().reshape(-1, 2)
    pairs = pairs - pairs.mean(0).astype(np.float32)
    distance = np.linalg.norm(pairs, axis=1)
    steps = side / 2 + np.arange(shells_count + 1) * (distance.max() - side / 2) / shells_count
    steps[-1] = distance.max()
    shell = np.argmax(distance[:, None] <= steps, axis=1)
    shell[np.abs(pairs).max(1) <= side / 2] = 0
    scaled = pairs / (2 * steps[shell])[:, None]
    found, index = neighbors.KDTree(unit, leaf_size=100).query(scaled, k=1)
    return torch.from_numpy(shell * len(unit) + index[:, 0]), torch.from_numpy(found[:, 0])


def test_paper_settings_give_the_index_of_brute_force_on_every_pair(trained: Tensor):
    of = winding_scheme(*trained.shape, **PAPER)
    tensors = encode(trained, of, "fast")
    codes, unit = winding_codes(tensors, of).flatten(), nodes(of, CPU)
    shell = codes // len(unit)
    points = trained.double().view(-1, 2) - tensors["centre"].double()
    scaled = (points / tensors["shell_side"].double()[shell].unsqueeze(1)).float()
    assert shell.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(codes % len(unit), nearest_brute_force(scaled, unit).long())


def test_paper_settings_agree_with_a_kd_tree_in_float64(trained: Tensor):
    of = winding_scheme(*trained.shape, **PAPER)
    tensors = encode(trained, of, "fast")
    codes, unit = winding_codes(tensors, of).flatten(), nodes(of, CPU)
    wanted, distance = paper_reference(trained, of)
    shell = codes // len(unit)
    assert torch.equal(shell, wanted // len(unit))
    points = trained.double().view(-1, 2) - tensors["centre"].double()
    scaled = points / tensors["shell_side"].double()[shell].unsqueeze(1)
    ours = (scaled - unit.double()[codes % len(unit)]).norm(dim=1)
    torch.testing.assert_close(ours, distance, rtol=0, atol=1e-7)  # float32 steps of a coordinate up to one half
    assert (codes == wanted).double().mean() > 0.999  # the rest are ties within float32
