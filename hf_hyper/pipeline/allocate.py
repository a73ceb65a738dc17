"""Rates for the layers of a network.

Without data small layers get more bits: `spread_bits` goes as far as that leads; `mixed_bits` stays with the two rates
next to one that cannot be stored. `bits_by_loss` spends them where they spare the most of a loss that is known, and
`bits_within_loss` as few of them as keep such a loss within a bound.

Where the relative error of each layer counts the same, and falls by 4 with every bit, the least sum of errors at a
given average has

    bits of a layer = constant - 1/2 log2(weights of the layer)

so small layers, which cost little, get more. Convolutional networks need it: their first layers hold few weights and
everything passes through them. The layers of a language model are nearly of one size, and all get nearly the same.
"""

import heapq
import math
from collections.abc import Mapping

from hf_hyper.config import HyperConfig
from hf_hyper.encoders.shift import DISTORTION
from hf_hyper.errors import ConfigError
from hf_hyper.hyperfunctions.winding import WindingOptions

__all__ = ["bits_by_loss", "bits_within_loss", "mixed_bits", "rates_between", "spread_bits"]

STEPS = 32
"""Averages to a bit that `bits_within_loss` tries."""


def spread_bits(sizes: Mapping[str, int], average: float, step: float = 1.0, least: float = 2.0) -> dict[str, float]:
    """Bits of every layer.

    Args:
        sizes: Weights by name of the layer.
        average: Most bits per weight over all of them, at least `least`.
        step: Rates come in multiples of it: 1 for `shift`, 1/2 for `winding`.
        least: Fewest bits of a layer; the most are 8.

    Returns:
        Bits by name, the largest constant whose average is at most `average`.

    Example:
        >>> spread_bits({"first": 1000, "last": 1_000_000}, 4)
        {'first': 8.0, 'last': 3.0}
    """

    def bits(constant: float) -> dict[str, float]:
        exact = {name: constant - math.log2(size) / 2 for name, size in sizes.items()}
        return {name: min(max(math.floor(rate / step + 0.5) * step, least), 8.0) for name, rate in exact.items()}

    low, high = 0.0, 64.0
    for _ in range(50):
        middle = (low + high) / 2
        rates = bits(middle)
        spent = sum(rates[name] * size for name, size in sizes.items())
        low, high = (middle, high) if spent <= average * sum(sizes.values()) else (low, middle)
    return bits(low)


def mixed_bits(sizes: Mapping[str, int], average: float, step: float = 1.0) -> dict[str, float]:
    """Rates of every layer, the two next to `average`, that come as close to it from below as layers allow.

    The layers with the fewest weights get the higher one, of equal ones those nearest to either end of the network:
    the same relative error costs least there.

    Args:
        sizes: Weights by name of the layer, in the order of the network.
        average: Bits per weight over all of them.
        step: Rates come in multiples of it: 1 for `shift`, 1/K for `winding` with K weights to a point.

    Returns:
        Bits by name.

    Example:
        >>> mixed_bits({"a": 100, "b": 300, "c": 100}, 3.4)
        {'a': 4.0, 'b': 3.0, 'c': 4.0}
    """
    steps, names = math.floor(average / step + 1e-9), list(sizes)
    bits = dict.fromkeys(names, steps * step)
    left = (average - steps * step) * sum(sizes.values())
    for place in sorted(range(len(names)), key=lambda i: (sizes[names[i]], min(i, len(names) - 1 - i), i)):
        cost = sizes[names[place]] * step
        if cost <= left:
            bits[names[place]] = (steps + 1) * step
            left -= cost
    return bits


def bits_by_loss(sizes: Mapping[str, int], losses: Mapping[str, float], average: float) -> dict[str, float]:
    """Whole bits of every layer with the least sum of losses, from one below the average to two above it.

    A layer of b bits loses its entry in `losses` times `DISTORTION[b]`. The estimates hold for small errors, so no
    layer goes far from the average; rates from 1 to 8 would promise 1 % less loss on a SmolLM2.

    Args:
        sizes: Weights by name of the layer.
        losses: By name, for a distortion of one.
        average: Bits per weight over all of them, met from below as closely as layers allow.

    Returns:
        Bits by name.

    Example:
        >>> bits_by_loss({"a": 100, "b": 100, "c": 100}, {"a": 1.0, "b": 9.0, "c": 2.0}, 3)
        {'a': 2.0, 'b': 4.0, 'c': 3.0}
    """
    whole = math.floor(average + 1e-9)
    least, most = max(whole - 1, 1), min(whole + 2, 8)
    bits = dict.fromkeys(sizes, least)
    left = (average - least) * sum(sizes.values())
    names = list(sizes)

    def step(place: int) -> tuple[float, int]:
        name = names[place]
        spared = DISTORTION[bits[name]] - DISTORTION[bits[name] + 1]
        return -losses[name] * spared / sizes[name], place

    steps = [step(place) for place in range(len(names))]
    heapq.heapify(steps)
    while steps:
        _, place = heapq.heappop(steps)
        name = names[place]
        if sizes[name] > left + 1e-6:
            continue
        left -= sizes[name]
        bits[name] += 1
        if bits[name] < most:
            heapq.heappush(steps, step(place))
    return {name: float(rate) for name, rate in bits.items()}


def bits_within_loss(
    sizes: Mapping[str, int], losses: Mapping[str, float], counted: Mapping[str, float], bound: float
) -> dict[str, float]:
    """Whole bits of every layer, of the least average that keeps a sum of losses within a bound.

    Args:
        sizes: Weights by name of the layer.
        losses: By name, for a distortion of one: what `bits_by_loss` goes by.
        counted: The same of the losses whose sum is bounded.
        bound: On the sum of `counted` times the distortions.

    Returns:
        Bits by name.

    Raises:
        ConfigError: 8 bits for every layer are too few.

    Example:
        >>> bits_within_loss({"a": 100, "b": 100}, {"a": 1.0, "b": 9.0}, {"a": 1.0, "b": 9.0}, 0.1)
        {'a': 2.0, 'b': 4.0}
    """

    expected = math.inf
    for step in range(STEPS, 8 * STEPS + 1):
        rates = bits_by_loss(sizes, losses, step / STEPS)
        expected = sum(counted[name] * DISTORTION[int(rate)] for name, rate in rates.items())
        if expected <= bound:
            return rates
    raise ConfigError(f"max_kl {bound:g} is below the {expected:.2g} that 8 bits are expected to cost; raise it")


def rates_between(config: HyperConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bits of every layer where `config.bits` is not a rate that one layer can have, else nothing.

    A number of points that is given fixes the rate of `winding`, whatever `config.bits`.

    Args:
        config: What the user asked for.
        sizes: Weights by name of the layer, in the order of the network.
    """
    winding = config.winding if isinstance(config.winding, WindingOptions) else WindingOptions()
    together = winding.dimension if config.hyperfunction == "winding" else 1
    steps = config.bits * together
    if not sizes or abs(steps - round(steps)) < 1e-6 or winding.num_points is not None:
        return {}
    bits = mixed_bits(sizes, config.bits, 1 / together)
    try:
        config.scheme(1, 1, min(bits.values()))
    except ConfigError:  # the lower of the two is too few for the shells
        return {}
    return bits
