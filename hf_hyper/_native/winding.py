"""Nearest points of `winding` by the compiled core."""

import torch
from torch import Tensor

from hf_hyper._native.library import check, require, thread_count
from hf_hyper.errors import ConfigError, ShapeError


def winding_nearest(points: Tensor, nodes: Tensor, threads: int | None = None) -> Tensor:
    """Nearest node for every point, by squared distance in float32; the lowest index on a tie.

    Args:
        points: `[n, 2]` CPU tensor of magnitudes up to 1e18; converted to float32.
        nodes: `[m, 2]` CPU tensor, m >= 1; converted to float32.
        threads: Threads to use; `torch.get_num_threads()` unless given. The result does not depend on it.

    Returns:
        `[n]` int32 in `[0, m)`.

    Raises:
        ShapeError: `points` is not `[n, 2]` or `nodes` not `[m, 2]`.
        ConfigError: A coordinate is NaN or infinite, or an argument lies outside its range.
        KernelUnavailable: There is no compiled core.
    """
    library = require()
    for name, tensor in (("points", points), ("nodes", nodes)):
        if tensor.ndim != 2 or tensor.shape[1] != 2:
            raise ShapeError(f"{name}: got shape {list(tensor.shape)}, wanted [count, 2]")
        if tensor.device.type != "cpu":
            raise ConfigError(f"{name}: got a tensor on {tensor.device}, wanted cpu")
    if len(nodes) == 0:
        raise ShapeError("nodes: got none, wanted at least one")
    points, nodes = points.detach().float().contiguous(), nodes.detach().float().contiguous()
    index = torch.empty(len(points), dtype=torch.int32, device="cpu")
    result = library.hyper_winding_nearest(
        points.data_ptr(), len(points), nodes.data_ptr(), len(nodes), thread_count(threads), index.data_ptr()
    )
    check(result, "winding_nearest")
    return index
