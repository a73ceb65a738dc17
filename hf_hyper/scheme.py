"""How one weight matrix is stored: everything a reader needs besides the tensors themselves.

A `TensorScheme` is the only description that hyperfunctions, encoders, kernels and storage see. It is frozen and
hashable, and `key` turns it into one line of text (and `parse` back), which is what custom operators carry: torch
treats a string as a constant, so `torch.compile` specialises on it and never looks inside.

User-facing options live in `config.py`; this file knows nothing of models or files.
"""

import dataclasses
import functools
from dataclasses import dataclass

from hf_hyper.errors import ConfigError

__all__ = ["TILE", "TensorScheme", "padded"]

TILE = 16
"""Rows and columns of a tile; both sides of a weight matrix are padded to multiples of it."""


def padded(size: int) -> int:
    """Smallest multiple of `TILE` that is at least `size`."""
    return -(-size // TILE) * TILE


@dataclass(frozen=True)
class TensorScheme:
    """Storage of one `[out_features, in_features]` weight matrix.

    Attributes:
        hyperfunction: Name in the table of `hf_hyper.hyperfunctions`.
        bits: Code bits per weight, overheads not counted; the hyperfunction says which values exist.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        incoherence: Whether the codes describe the weight after signs and rotations on both sides.
        input_blocks: Equal parts of the padded input side that are rotated separately (1: full width).
        seed: Start of the sign generator, `0 <= seed < 2**64`.
        options: Constants of the hyperfunction as sorted `(name, integer)` pairs.
    """

    hyperfunction: str
    bits: float
    out_features: int
    in_features: int
    incoherence: bool = True
    input_blocks: int = 1
    seed: int = 0
    options: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.out_features < 1 or self.in_features < 1:
            raise ConfigError(
                f"a weight of shape [{self.out_features}, {self.in_features}] has no elements; leave the module "
                "out with modules_to_not_convert"
            )
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed {self.seed} is outside 0..2**64-1; choose a non-negative 64-bit integer")
        if self.input_blocks < 1 or self.padded_in % (TILE * self.input_blocks):
            raise ConfigError(
                f"input_blocks {self.input_blocks} does not cut {self.padded_in} padded columns into equal "
                f"multiples of {TILE}; choose a divisor of {self.padded_in // TILE}"
            )

    @property
    def padded_out(self) -> int:
        """Rows as stored, a multiple of `TILE`."""
        return padded(self.out_features)

    @property
    def padded_in(self) -> int:
        """Columns as stored, a multiple of `TILE`."""
        return padded(self.in_features)

    @property
    def num_weights(self) -> int:
        """Weights of the matrix, padding not counted."""
        return self.out_features * self.in_features

    def option(self, name: str) -> int:
        """Constant `name` of the hyperfunction.

        Raises:
            ConfigError: The scheme has no such constant.
        """
        for key, value in self.options:
            if key == name:
                return value
        raise ConfigError(f"scheme {self.key!r} has no option {name!r}; {self.hyperfunction} needs it")

    @property
    def key(self) -> str:
        """The scheme as one line of text, `name=value` fields joined by commas; `parse` reads it back."""
        fields = [f"{field.name}={getattr(self, field.name)!s}" for field in dataclasses.fields(self)[:-1]]
        return ",".join(fields + [f"{name}={value}" for name, value in self.options])

    @staticmethod
    @functools.cache
    def parse(key: str) -> "TensorScheme":
        """The scheme whose `key` this is.

        Raises:
            ConfigError: The text does not come from `key`.
        """
        try:
            values = dict(field.split("=") for field in key.split(","))
            return TensorScheme(
                hyperfunction=values.pop("hyperfunction"),
                bits=float(values.pop("bits")),
                out_features=int(values.pop("out_features")),
                in_features=int(values.pop("in_features")),
                incoherence=values.pop("incoherence") == "True",
                input_blocks=int(values.pop("input_blocks")),
                seed=int(values.pop("seed")),
                options=tuple((name, int(value)) for name, value in values.items()),
            )
        except (KeyError, ValueError) as error:
            raise ConfigError(f"scheme {key!r} cannot be read ({error}); build it with TensorScheme.key") from error
