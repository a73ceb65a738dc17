"""Orthogonal mixing of any multiple of 16: a Walsh-Hadamard transform times small cosine transforms.

A width n = 2^a · m (m odd) is mixed by H(2^a) ⊗ D(m1) ⊗ D(m2) ..., where H is the orthonormal Walsh-Hadamard matrix
in Sylvester order, D the orthonormal DCT-II, and m = m1 · m2 · ... comes from `odd_factors`. All of it is closed-form,
so a checkpoint needs no table. H is symmetric; D is not, which is why `rotate` has an inverse.

Cost per element: a additions and m1 + m2 + ... multiplications.
"""

import functools
import math

import torch
from torch import Tensor

__all__ = ["dct_matrix", "hadamard", "odd_factors", "rotate", "unrotate"]

MAX_JOINED_FACTOR = 64
MAX_PRIME_FACTOR = 1024
MAX_DENSE_HADAMARD = 64


@functools.cache
def odd_factors(width: int) -> tuple[int, ...]:
    """Sizes of the cosine transforms for the odd part of `width`.

    Prime factors, ascending, are joined while their product stays at most 64; a prime above 1024 is dropped, so that
    its direction stays unmixed and the cost stays bounded.

    Example:
        >>> odd_factors(576), odd_factors(29568), odd_factors(16 * 100003)
        ((9,), (21, 11), ())
    """
    odd = width // (width & -width)
    factors: list[int] = []
    divisor = 3
    while odd > 1:
        if divisor * divisor > odd:
            divisor = odd
        while odd % divisor == 0:
            odd //= divisor
            if divisor > MAX_PRIME_FACTOR:
                continue
            if factors and factors[-1] * divisor <= MAX_JOINED_FACTOR:
                factors[-1] *= divisor
            else:
                factors.append(divisor)
        divisor += 2
    return tuple(factors)


@functools.cache
def dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II matrix, `[size, size]` float32, computed in float64.

    Row i, column j: `sqrt((2 - [i = 0]) / size) · cos(pi · (2j + 1) · i / (2 size))`.
    """
    i = torch.arange(size, dtype=torch.float64, device="cpu").unsqueeze(1)
    j = torch.arange(size, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi * (2 * j + 1) * i / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


@functools.cache
def hadamard_matrix(size: int) -> Tensor:
    """Orthonormal Walsh-Hadamard matrix in Sylvester order, `[size, size]` float32 for a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32, device="cpu"), matrix)
    return matrix * size**-0.5


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dimension, a power of two; its own inverse.

    A product with a small dense matrix for every 6 bits of the index: a few passes over memory instead of one per bit.
    """
    width = x.shape[-1]
    done = 1
    while done < width:
        size = min(MAX_DENSE_HADAMARD, width // done)
        matrix = hadamard_matrix(size).to(x.device, x.dtype)
        if done == 1:
            x = (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)
        else:
            x = (matrix @ x.unflatten(-1, (-1, size, done))).flatten(-3)
        done *= size
    return x


def rotate(x: Tensor) -> Tensor:
    """Mix the last dimension by the orthogonal matrix of its width.

    Args:
        x: `[..., n]` floating point; n is read as `[m1, m2, ..., unmixed, 2^a]`, the last index running fastest.

    Returns:
        `[..., n]`, same dtype.

    Source: incoherence processing, arXiv 2402.04396 (random Hadamard transform).
    """
    return _mix(x, inverse=False)


def unrotate(x: Tensor) -> Tensor:
    """Inverse (and transpose) of `rotate`."""
    return _mix(x, inverse=True)


def _mix(x: Tensor, *, inverse: bool) -> Tensor:
    width = x.shape[-1]
    power = width & -width
    factors = odd_factors(width)
    unmixed = width // power // math.prod(factors)
    x = hadamard(x.unflatten(-1, (*factors, unmixed, power)))
    for axis, size in enumerate(factors, start=-len(factors) - 2):
        matrix = dct_matrix(size).to(x.device, x.dtype)
        x = torch.movedim(torch.movedim(x, axis, -1) @ (matrix if inverse else matrix.T), -1, axis)
    return x.flatten(-len(factors) - 2)
