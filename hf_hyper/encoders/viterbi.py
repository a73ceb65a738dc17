"""Tail-biting Viterbi search over the windows of `shift`, in plain torch.

The ground truth for the compiled encoder: the integer arithmetic, the order of ties and the closing of the ring are
those defined at the top of `csrc/shift_encode.cpp`, so both return the same bytes. All classes of all tiles advance by
one weight at a time; the only loop in Python is over the weights. Some thousand times slower than the compiled core.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_hyper.errors import ConfigError, ShapeError
from hf_hyper.hyperfunctions.shift import STATE_BITS, TILE_WEIGHTS, byte_sums, states

__all__ = ["encode_tiles_reference"]

_NEVER = 65535
_RESCALE_AT = 4096
_CENTRE = 510
_WIDEN_STEPS = 4
_MAX_DISTANCE = 255
_SCALE = {1: 32, 2: 32, 3: 48, 4: 48, 5: 2, 6: 4, 7: 8, 8: 16}


FullSearch = Callable[[Tensor, Tensor, int, int], Tensor]
"""Table `[65536]`, targets `[n, 256]`, bits, weights on either side of the seam -> symbols `[n, 256]`."""


def encode_tiles_reference(
    tiles: Tensor, bits: int, survivor_bits: int, multiplier: int, full_search: FullSearch | None = None
) -> Tensor:
    """Closest circular bit string of every tile, as `_native.shift_encode` returns it.

    Args:
        tiles: `[n, 256]` floats in units of the observable (unit variance), all finite, on any device. Whether they
            are is not looked at where there is a `full_search`, because looking waits for the device.
        bits: Bits per weight, 1..8.
        survivor_bits: Effort, 8..16; 16 is the full search.
        multiplier: Odd 32-bit constant of the observable.
        full_search: Takes the place of the full search in plain torch.

    Returns:
        `[n, 8 * bits]` int32 on the device of `tiles`.

    Raises:
        ShapeError: `tiles` is not `[n, 256]`.
        ConfigError: A weight is NaN or infinite.
    """
    if tiles.ndim != 2 or tiles.shape[1] != TILE_WEIGHTS:
        raise ShapeError(f"tiles: got shape {list(tiles.shape)}, wanted [n, {TILE_WEIGHTS}]")
    if full_search is None and not tiles.isfinite().all():
        raise ConfigError("tiles: contain NaN or infinity; every weight must be finite")
    survivor_bits = max(survivor_bits, min(STATE_BITS, 2 * bits))
    search = _survivor_search
    if survivor_bits == STATE_BITS:
        search = _full_search if full_search is None else _adapted(full_search)
    tiles = tiles.float()
    code = _Code.build(bits, survivor_bits, multiplier, _SCALE[bits], tiles.device)
    targets = code.targets(tiles)
    symbols = search(code, targets)
    if bits <= 4:
        return _pack(symbols, bits)

    # Tails: where a branch on the path was clamped, coarser scales can reach farther.
    distance = code.distance(symbols, targets)
    error, clamped = distance.square().sum(1), (distance >= _MAX_DISTANCE).any(1)
    scale = code.scale // 2
    while scale >= 1 and bool(clamped.any()):
        coarse = _Code.build(bits, survivor_bits, multiplier, scale, tiles.device)
        index = clamped.nonzero().squeeze(1)
        coarse_targets = coarse.targets(tiles[index])
        found = search(coarse, coarse_targets)
        clamped[index] = (coarse.distance(found, coarse_targets) >= _MAX_DISTANCE).any(1)
        now = code.distance(found, targets[index]).square().sum(1)
        better = now < error[index]
        error[index[better]], symbols[index[better]] = now[better], found[better]
        scale //= 2
    return _pack(symbols, bits)


@dataclass(frozen=True)
class _Code:
    """What the search needs that does not depend on the tile; symbols as in `csrc/shift_encode.cpp`."""

    bits: int
    class_bits: int  # R
    scale: int
    table: Tensor  # [65536] int32, T
    least: int  # entries of the table lie between
    largest: int
    mean: float
    deviation: float

    @classmethod
    @functools.lru_cache(maxsize=64)
    def build(cls, bits: int, survivor_bits: int, multiplier: int, scale: int, device: torch.device) -> "_Code":
        sums = byte_sums(multiplier)
        exact, entries = sums.double(), (sums - _CENTRE) * scale
        return cls(
            bits,
            survivor_bits - bits,
            scale,
            entries.to(device, torch.int32),
            int(entries.min()),
            int(entries.max()),
            exact.mean().item(),
            exact.std(correction=0).item(),
        )

    @property
    def seam_weights(self) -> int:
        """Weights searched on either side of the seam."""
        spans = 8 if self.class_bits == STATE_BITS - self.bits else 4
        return spans * -(-STATE_BITS // self.bits)

    @property
    def classes(self) -> int:
        return 1 << (STATE_BITS - self.bits)

    def targets(self, tiles: Tensor) -> Tensor:
        units = (tiles.double() * self.deviation + self.mean - _CENTRE) * self.scale
        if self.bits <= 4:
            low, high = -32767, 32767
        else:
            low, high = self.least - 128, self.largest + 128
        return units.clamp(low, high).round().to(torch.int32)

    def branch(self, entry: Tensor, target: Tensor) -> Tensor:
        """Cost of the table entries `[n, ...]` for the targets `[n]`."""
        d = entry - target.view(-1, *[1] * (entry.ndim - 1))
        if self.bits <= 4:
            d = d.clamp(-32768, 32767)
            return (d * d + (1 << 14)) >> 15
        d = d.abs().clamp(max=_MAX_DISTANCE)
        return d * d

    def distance(self, symbols: Tensor, targets: Tensor) -> Tensor:
        """`|T - u|` `[n, 256]` int64 on the path of the symbols `[n, 256]`."""
        return (self.table[states(_pack(symbols, self.bits), self.bits)] - targets).abs().long()

    def ring(self) -> list[int]:
        """Weights of pass 1."""
        return [t % TILE_WEIGHTS for t in range(-self.seam_weights, self.seam_weights)]


def _adapted(full_search: FullSearch) -> Callable[[_Code, Tensor], Tensor]:
    return lambda code, targets: full_search(code.table, targets, code.bits, code.seam_weights)


def _rescale(costs: Tensor) -> Tensor:
    lowest = costs.amin(1, keepdim=True)
    return torch.where(lowest >= _RESCALE_AT, costs - lowest, costs)


def _first_minimum(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum along dimension 1, of 2^m entries with m up to 16, and the lowest index that has it; both int32."""
    index = torch.arange(costs.shape[1], device=costs.device).view(1, -1, *[1] * (costs.ndim - 2))
    low = costs.to(torch.int64) << 16 | index
    # Halves against each other: torch reduces a short strided dimension tens of times slower.
    while low.shape[1] > 1:
        low = torch.minimum(*low.chunk(2, 1))
    low = low.squeeze(1)
    return (low >> 16).to(torch.int32), (low & 0xFFFF).to(torch.int32)


def _full_search(code: _Code, targets: Tensor) -> Tensor:
    """Targets `[n, 256]` -> symbols `[n, 256]`."""
    n, choices = len(targets), 1 << code.bits
    entries = code.table.view(1, code.classes, choices)  # state = class before, symbol
    successor = torch.arange(code.classes, dtype=torch.int32, device=targets.device)

    def run(costs: Tensor, weights: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Costs after the weights and, for each weight, the class before it by class after it."""
        origins = []
        for t in weights:
            total = (costs.unsqueeze(2) + code.branch(entries, targets[:, t])).clamp(max=_NEVER)
            costs, h = _first_minimum(total.view(n, choices, code.classes))
            origins.append((h * code.classes + successor) >> code.bits)
            costs = _rescale(costs)
        return costs, origins

    costs, origins = run(targets.new_zeros(n, code.classes), code.ring())
    seam = _first_minimum(costs)[1].long().unsqueeze(1)
    for origin in reversed(origins[code.seam_weights :]):
        seam = origin.gather(1, seam).long()

    start = targets.new_full((n, code.classes), _NEVER).scatter(1, seam, 0)
    _, origins = run(start, list(range(TILE_WEIGHTS)))
    now, path = seam, []
    for origin in reversed(origins):
        path.append(now)
        now = origin.gather(1, now).long()
    return torch.cat(path[::-1], 1) & (choices - 1)


def _survivor_search(code: _Code, targets: Tensor) -> Tensor:
    """Targets `[n, 256]` -> symbols `[n, 256]`."""
    n, k = len(targets), code.bits
    symbol_mask = (1 << k) - 1
    every = torch.arange(code.classes, dtype=torch.int32, device=targets.device)
    symbols = every[: 1 << k]

    def step(costs: Tensor, windows: Tensor, width: int, t: int) -> tuple[Tensor, Tensor]:
        """Costs and windows `[n, 2^width]` after weight t."""
        state = (windows.unsqueeze(2) << k | symbols) & 0xFFFF  # [n, class before, symbol]
        branches = code.branch(code.table[state], targets[:, t])
        total = (costs.unsqueeze(2) + branches).clamp(max=_NEVER)
        costs, h = _first_minimum(total.view(n, -1, 1 << width))
        windows = state.view(n, -1, 1 << width).gather(1, h.long().unsqueeze(1)).squeeze(1)
        return _rescale(costs), windows

    def trace(history: list[Tensor], c: Tensor) -> Tensor:
        """Classes `[n, steps + 1]` on the path into the classes `c` `[n, 1]`, from the first to the last."""
        path = [c]
        for windows, older in zip(history[:0:-1], history[-2::-1], strict=True):
            path.append((windows.gather(1, path[-1]) >> k & (older.shape[1] - 1)).long())
        return torch.cat(path[::-1], 1)

    start = every[: 1 << code.class_bits].expand(n, -1)
    costs, history = torch.zeros_like(start), [start]
    for t in code.ring():
        costs, windows = step(costs, history[-1], code.class_bits, t)
        history.append(windows)
    last = _first_minimum(costs)[1].long().unsqueeze(1)
    middle = trace(history[code.seam_weights :], last)[:, :1]
    seam = history[code.seam_weights].gather(1, middle) & (code.classes - 1)  # [n, 1]

    first = (seam & (start.shape[1] - 1)).long()
    costs = torch.full_like(start, _NEVER).scatter(1, first, 0)
    history = [start.scatter(1, first, seam)]
    forced = (STATE_BITS - k) // k
    end = TILE_WEIGHTS - forced
    for t in range(end):
        width = max(code.class_bits, STATE_BITS - k - (end - 1 - t) // _WIDEN_STEPS)
        costs, windows = step(costs, history[-1], width, t)
        history.append(windows)

    window, tail = history[-1], []
    for t in range(end, TILE_WEIGHTS):
        tail.append(seam >> k * (TILE_WEIGHTS - 1 - t) & symbol_mask)
        window = (window << k | tail[-1]) & 0xFFFF
        costs = costs + code.branch(code.table[window], targets[:, t])
    loose = STATE_BITS - k - k * forced  # bits of the last free symbol that are the seam's too
    fits = every & ((1 << loose) - 1) == seam >> k * forced
    costs = torch.where(fits, costs, torch.iinfo(torch.int32).max)
    path = trace(history, _first_minimum(costs)[1].long().unsqueeze(1))
    return torch.cat([path[:, 1:] & symbol_mask, *tail], 1)


def _pack(symbols: Tensor, bits: int) -> Tensor:
    """Symbols `[n, 256]` -> words `[n, 8 * bits]` int32, most significant bit first."""
    shifts = torch.arange(bits - 1, -1, -1, device=symbols.device)
    string = (symbols.long().unsqueeze(-1) >> shifts & 1).view(len(symbols), -1, 32)
    weights = torch.arange(31, -1, -1, device=symbols.device)
    return (string << weights).sum(-1).to(torch.int32)
