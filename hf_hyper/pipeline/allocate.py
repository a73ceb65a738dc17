"""Rates for the layers of a network without data: small layers get more bits.

`spread_bits` goes as far as that leads; `mixed_bits` stays with the two whole numbers around a fractional rate.

Where the relative error of each layer counts the same, and falls by 4 with every bit, the least sum of errors at a
given average has

    bits of a layer = constant - 1/2 log2(weights of the layer)

so small layers, which cost little, get more. Convolutional networks need it: their first layers hold few weights and
everything passes through them. The layers of a language model are nearly of one size, and all get nearly the same.
"""

import math
from collections.abc import Mapping

__all__ = ["mixed_bits", "spread_bits"]


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


def mixed_bits(sizes: Mapping[str, int], average: float) -> dict[str, int]:
    """Whole bits of every layer, those next to `average`, that come as close to it from below as layers allow.

    The layers with the fewest weights get the higher number, of equal ones those nearest to either end of the network:
    the same relative error costs least there.

    Args:
        sizes: Weights by name of the layer, in the order of the network.
        average: Bits per weight over all of them.

    Returns:
        Bits by name.

    Example:
        >>> mixed_bits({"a": 100, "b": 300, "c": 100}, 3.4)
        {'a': 4, 'b': 3, 'c': 4}
    """
    low, names = math.floor(average), list(sizes)
    bits = dict.fromkeys(names, low)
    left = (average - low) * sum(sizes.values())
    for place in sorted(range(len(names)), key=lambda i: (sizes[names[i]], min(i, len(names) - 1 - i), i)):
        if sizes[names[place]] <= left:
            bits[names[place]] += 1
            left -= sizes[names[place]]
    return bits
