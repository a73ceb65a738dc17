"""What a hyperfunction is to the rest of the package, and the table of those that exist.

A hyperfunction is a pair (T, h): an ergodic map T on [0, 1) and an observable h. A group of weights is stored as the
one number x whose orbit `h(x), h(Tx), h(T²x), ...` passes closest to it. A member of the table says which tensors
hold those numbers and turns them back into weights. Finding the numbers is the work of its encoder (`encoders/`),
decoding them fast that of its kernel (`kernels/`); nothing else knows which member it deals with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_hyper.errors import ConfigError
from hf_hyper.scheme import TensorScheme

__all__ = ["Hyperfunction", "TensorSpec", "get", "names", "register"]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Hyperfunction(Protocol):
    """One member of the family: its storage and its decoding."""

    name: str
    """Name in configs and checkpoints."""

    incoherence: bool
    """Whether weights are rotated before encoding unless a scheme says otherwise."""

    def resolve(self, bits: float, options: Mapping[str, object]) -> tuple[float, tuple[tuple[str, int], ...]]:
        """Round a requested rate to one that exists and complete the constants.

        Args:
            bits: Requested code bits per weight, any real number in 1..8.
            options: User options of this hyperfunction; may be empty.

        Returns:
            Code bits per weight and the sorted `options` of the `TensorScheme`.

        Raises:
            ConfigError: The rate or an option cannot be used.
        """
        ...

    def tensors(self, scheme: TensorScheme) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors; `codes` comes first."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], scheme: TensorScheme) -> Tensor:
        """Weights in the basis in which they were encoded.

        Args:
            tensors: As described by `tensors`, all on one device.
            scheme: How they are stored.

        Returns:
            `[padded_out, padded_in]` float32 with incoherence, else `[out_features, in_features]` float32.
        """
        ...

    def take(
        self, tensors: Mapping[str, Tensor], scheme: TensorScheme, tiles: Tensor
    ) -> tuple[dict[str, Tensor], TensorScheme]:
        """Stored tensors of some rows, and the scheme by which `decode` reads them.

        Args:
            tensors: As described by `tensors`.
            scheme: How they are stored.
            tiles: `[n]` int64, which groups of `TILE` rows; row `16 * i + j` of the result is row `16 * tiles[i] + j`
                of the whole, and any row where the whole has none.
        """
        ...


_TABLE: dict[str, Hyperfunction] = {}


def register(hyperfunction: Hyperfunction) -> None:
    """Add a member to the table under its name."""
    _TABLE[hyperfunction.name] = hyperfunction


def names() -> list[str]:
    """Names of all members, the default first."""
    return list(_TABLE)


def get(name: str) -> Hyperfunction:
    """The member called `name`.

    Raises:
        ConfigError: There is none.
    """
    if name not in _TABLE:
        raise ConfigError(f"hyperfunction {name!r} does not exist; choose one of {', '.join(map(repr, _TABLE))}")
    return _TABLE[name]
