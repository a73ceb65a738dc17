"""Rounding with feedback: the error of one tile is made up for by the tiles that follow.

With M = L D L^T (`moments.block_factor`) the damage tr(O E I E^T) is a sum over tiles (i, j) of the squared errors
(L_O^T E L_I)_ij, weighted by the diagonal blocks. Going from the last row and column of tiles to the first,

    target_ij = W_ij + (L_O^T E L_I)_ij - E_ij

needs errors of earlier tiles only, and the tile's own error is all that it adds. Without O the tiles of one column are
independent of each other: LDLQ (QuIP, arXiv 2307.13304), which is GPTQ's update. With O it is the rounding of YAQA
(arXiv 2505.22988), and the tiles of one anti-diagonal are independent.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_hyper.scheme import TILE

__all__ = ["Encode", "round_with_feedback"]

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Tiles `[n, 256]` in units of the code -> their codes `[n, words]` and what these stand for, `[n, 256]`."""

PANEL = 256
"""Columns whose errors are gathered before they are carried to all columns before them in one product."""


def round_with_feedback(
    weight: Tensor, scale: Tensor, encode: Encode, inputs: Tensor, outputs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Encode a weight tile by tile, each tile knowing the errors of those before it.

    Args:
        weight: `[rows, columns]`, multiples of 16.
        scale: `[rows]`; codes stand for weights in units of it. Rows of scale zero stay zero.
        encode: Searches tiles.
        inputs: Factor L_I of the inputs' second moment, `[columns, columns]`.
        outputs: Factor L_O of the gradients' second moment, `[rows, rows]`; None takes the identity.

    Returns:
        Codes `[rows / 16, columns / 16, words]` and values `[rows, columns]`; the weight is about `scale * values`.
    """
    scale = scale.unsqueeze(1)
    divisor = torch.where(scale > 0, scale, 1.0)
    if outputs is None:
        return _by_columns(weight, scale, divisor, encode, inputs)
    return _by_diagonals(weight, scale, divisor, encode, inputs, outputs)


def _by_columns(
    weight: Tensor, scale: Tensor, divisor: Tensor, encode: Encode, inputs: Tensor
) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    values = torch.zeros_like(weight)
    target = weight.clone()  # grows by the feedback of finished panels
    codes: list[Tensor] = []
    for stop in range(columns, 0, -PANEL):
        start = max(0, stop - PANEL)
        error = weight.new_zeros(rows, stop - start)
        for left in range(stop - TILE, start - 1, -TILE):
            column, right = slice(left, left + TILE), left + TILE
            wanted = target[:, column] + error[:, right - start :] @ inputs[right:stop, column]
            found, value = encode((wanted / divisor).reshape(-1, TILE * TILE))
            codes.append(found)
            values[:, column] = value.view(-1, TILE)
            error[:, left - start : right - start] = weight[:, column] - scale * values[:, column]
        target[:, :start] += error @ inputs[start:stop, :start]
    return torch.stack(codes[::-1], 1), values


def _by_diagonals(
    weight: Tensor, scale: Tensor, divisor: Tensor, encode: Encode, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    down, across = rows // TILE, columns // TILE
    # Views by tile: [row of tiles, row, column of tiles, column].
    tiled = weight.view(down, TILE, across, TILE)
    values, error, mixed = (torch.zeros_like(tiled) for _ in range(3))  # mixed: E L_I where it is known
    inputs_by_tile = inputs.view(columns, across, TILE).transpose(0, 1)  # [across, columns, 16]
    outputs_by_tile = outputs.view(rows, down, TILE).permute(1, 2, 0)  # [down, 16, rows], transposed
    scale, divisor = scale.view(down, TILE, 1), divisor.view(down, TILE, 1)
    every = torch.arange(down, device=weight.device)
    codes: Tensor | None = None
    for diagonal in range(down + across - 2, -1, -1):
        # Slices by numbers that the host knows: asking the device for them would wait for it.
        top, bottom = max(0, diagonal - across + 1), min(down - 1, diagonal)
        part = slice(top, bottom + 1)
        i = every[part]
        j = diagonal - i
        right, below = TILE * (diagonal - bottom), TILE * top
        own = tiled[i, :, j]  # [tiles, 16, 16]
        carried = error.view(down, TILE, columns)[part, :, right:] @ inputs_by_tile[j, right:]
        above = mixed.view(rows, across, TILE)[below:].transpose(0, 1)[j]
        wanted = own + carried + outputs_by_tile[part, :, below:] @ above
        found, value = encode((wanted / divisor[part]).reshape(-1, TILE * TILE))
        value = value.view(-1, TILE, TILE)
        missed = own - scale[part] * value
        values[i, :, j], error[i, :, j], mixed[i, :, j] = value, missed, carried + missed
        if codes is None:
            codes = found.new_empty(down, across, found.shape[1])
        codes[i, j] = found
    assert codes is not None
    return codes, values.view(rows, columns)
