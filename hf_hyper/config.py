"""`HyperConfig`: the few dials of compression, and what a checkpoint says about itself.

In memory it is what a user passes to `from_pretrained(quantization_config=...)`. In `config.json` it also carries the
format version and the scheme of every compressed module, so that reading a folder never repeats a decision that was
taken when it was written. Run-time choices (kernels, threads) are not here.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_hyper import hyperfunctions
from hf_hyper.encoders import EFFORTS
from hf_hyper.errors import ConfigError, FormatError
from hf_hyper.hyperfunctions.winding import WindingOptions
from hf_hyper.layout import Layout
from hf_hyper.scheme import TensorScheme, padded

__all__ = ["FORMAT_VERSION", "HyperCompressionConfig", "HyperConfig"]

FORMAT_VERSION = 1
"""Version of `storage/FORMAT.md` that this package writes; it reads every older one."""

MIN_BITS, MAX_BITS = 1, 8

ALLOCATIONS = ("size", "loss")

ROUNDINGS = ("fit", "fisher", "ldlq", "plain")
WITH_GRADIENTS = ("fit", "fisher")
"""Roundings that know what the loss of the model feels."""


class HyperConfig(QuantizationConfigMixin):
    """How to compress a model with hyperfunctions.

    Args:
        bits: Average code bits per weight over the compressed tensors, any real number from 1 to 8. `shift` stores
            whole bits, `winding` whole bits a code: between two of them some tensors get more than others.
            Scales add about 32 / in_features bits. 4 is a good start, 3 and 2 suit larger models. `"auto"` takes as few
            as `max_kl` allows.
        hyperfunction: `"shift"` (best quality per bit) or `"winding"` (the method of arXiv 2409.00592).
        effort: How long to search: `"fast"`, `"balanced"` or `"best"`. Changes quality and compression time, never the
            format or the speed of the model. Calibrated weights are searched in full from `"balanced"` on.
        calibration: Text that shows how the model is used: None for none, `"default"` for the text that comes with the
            package, `"self"` for text that the model writes, a file, a data set (`NAME:CONFIG:SPLIT`), or a list of
            strings. Worth more than a bit a weight; costs minutes for a small model. Only with `shift`.
        calibration_tokens: How much of that text is read, at most.
        rounding: `"fit"` weighs errors by what the model does with them and then fits the row scales to the model's
            loss; `"fisher"` leaves the fit out, `"ldlq"` weighs only by the inputs of each layer, in less time;
            `"plain"` is LDLQ as published, for comparison. Only with `calibration`.
        allocation: Which tensors get more bits than others: `"loss"` gives bits to those whose errors the model's loss
            feels most, at whole `bits` too, from one below the average to two above; `"size"` stores whole `bits`
            alike and gives the next bit to small tensors between two of them. None takes `"loss"` where `rounding`
            knows the loss (`"fit"`, `"fisher"`), else `"size"`. `"loss"` takes a backward pass over an
            eighth of the text more, two batches at least.
        modules_to_not_convert: Names of modules that stay as they are, with transformers' semantics: None leaves the
            output head, whatever is tied to it and the last module; a list replaces that default.
        compress_embeddings: Compress embedding tables too; those tied to another module stay as they are.
        winding: Options of `winding`, a `WindingOptions` or a dict of its fields; only with that hyperfunction.
        seed: Start of the sign generator, a non-negative 64-bit integer.
        max_kl: With `bits="auto"`, the divergence from the original model in nats a token that the rounding may be
            expected to cost (half the squared error of the last hidden states for a model without a vocabulary). A
            forecast from the calibration text: before the fit of the scales, models came out at 0.7 to 1.1 times as
            much from 3 bits on and at 1.4 times at 2. Weights that calibration does not reach are stored with 8 bits.
            Needs `allocation="loss"`.
        format_version: Version of the storage format; set by the package.
        tensor_schemes: Scheme of every compressed module by name, set by the package. Fields that equal the
            hyperfunction's defaults are left out.

    Raises:
        ConfigError: An option has a value that cannot be used.
        FormatError: The folder was written by a newer version of the format.

    Example:
        >>> HyperConfig(bits=3).bits
        3.0
    """

    def __init__(
        self,
        bits: "float | str" = 4.0,
        hyperfunction: str = "shift",
        effort: str = "balanced",
        calibration: "str | Path | Sequence[str] | None" = None,
        calibration_tokens: int = 32768,
        rounding: str = "fit",
        allocation: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        compress_embeddings: bool = False,
        winding: "WindingOptions | Mapping[str, Any] | None" = None,
        seed: int = 0,
        max_kl: float | None = None,
        format_version: int = FORMAT_VERSION,
        tensor_schemes: Mapping[str, Mapping[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = "hyper"  # pyright: ignore[reportAttributeAccessIssue]
        unknown.pop("quant_method", None)
        _check_version(format_version)
        self.bits: float = MAX_BITS if bits == "auto" else bits  # pyright: ignore[reportAttributeAccessIssue]
        self.hyperfunction = hyperfunction
        self.effort = effort
        self.calibration = calibration
        self.calibration_tokens = calibration_tokens
        self.rounding = rounding
        self.allocation = allocation
        self.modules_to_not_convert = modules_to_not_convert
        self.compress_embeddings = compress_embeddings
        self.winding = winding
        self.seed = seed
        self.max_kl = max_kl
        self.format_version = format_version
        self.tensor_schemes = {name: dict(fields) for name, fields in (tensor_schemes or {}).items()}
        if self.tensor_schemes:  # read from a folder: how it was made need not be understood, only kept
            self.__dict__.update(unknown)
        else:
            self._check(unknown)
            self._check_max_kl(bits == "auto")

    def _check(self, unknown: Mapping[str, Any]) -> None:
        bits, seed, skipped = self.bits, self.seed, self.modules_to_not_convert
        if unknown:
            raise ConfigError(f"HyperConfig has no option {sorted(unknown)}; see help(hf_hyper.HyperConfig)")
        if isinstance(bits, bool) or not isinstance(bits, int | float) or not MIN_BITS <= bits <= MAX_BITS:
            raise ConfigError(
                f"bits is {bits!r}, wanted a number from {MIN_BITS} to {MAX_BITS} or 'auto'; 4 is a good start"
            )
        if self.effort not in EFFORTS:
            raise ConfigError(f"effort is {self.effort!r}, wanted one of {', '.join(map(repr, EFFORTS))}")
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f"rounding is {self.rounding!r}, wanted one of {', '.join(map(repr, ROUNDINGS))}")
        self.calibration = self._checked_calibration()
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise ConfigError(f"allocation is {self.allocation!r}, wanted one of {', '.join(map(repr, ALLOCATIONS))}")
        if self.allocation == "loss" and not self._knows_loss:
            found = "no calibration" if self.calibration is None else f"rounding {self.rounding!r}"
            raise ConfigError(
                f"allocation 'loss' needs calibration with rounding 'fit' or 'fisher', got {found}; leave it "
                "out, or add what is missing"
            )
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ConfigError(f"seed is {seed!r}, wanted an integer from 0 to 2**64-1")
        if not isinstance(self.compress_embeddings, bool):
            raise ConfigError(f"compress_embeddings is {self.compress_embeddings!r}, wanted True or False")
        if isinstance(skipped, str):
            raise ConfigError(
                f"modules_to_not_convert is the string {skipped!r}, wanted a list of module names; write [{skipped!r}]"
            )
        if self.winding is not None and self.hyperfunction != "winding":
            raise ConfigError(f"winding options given with hyperfunction {self.hyperfunction!r}; choose 'winding'")
        self.bits = float(bits)
        self.modules_to_not_convert = None if skipped is None else list(skipped)
        self.winding = _winding_options(self.winding)
        hyperfunctions.get(self.hyperfunction).resolve(self.bits, self._options())

    def _check_max_kl(self, automatic: bool) -> None:
        bound = self.max_kl
        if bound is None and not automatic:
            return
        if bound is None or not automatic:
            found = "bits 'auto' without max_kl" if automatic else f"max_kl {bound!r} with bits {self.bits:g}"
            raise ConfigError(f"got {found}, wanted both or neither; write bits='auto', max_kl=0.05")
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < math.inf:
            raise ConfigError(f"max_kl is {bound!r}, wanted a positive number of nats a token; 0.05 is a good start")
        if not self.bits_follow_loss:
            found = "no calibration" if self.calibration is None else f"rounding {self.rounding!r}"
            found = f"allocation {self.allocation!r}" if self._knows_loss else found
            raise ConfigError(
                f"max_kl needs calibration with rounding 'fit' or 'fisher' and allocation 'loss', got {found}; leave "
                "it out, or add what is missing"
            )

    def _checked_calibration(self) -> str | list[str] | None:
        source, tokens = self.calibration, self.calibration_tokens
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 4:
            raise ConfigError(
                f"calibration_tokens is {tokens!r}, wanted an integer of at least 4; 32768 is a good start"
            )
        if source is None or (isinstance(source, str) and source == "none"):
            return None
        if self.hyperfunction != "shift":
            raise ConfigError(
                f"calibration was given with hyperfunction {self.hyperfunction!r}, and only 'shift' can use it; leave "
                "one of them out"
            )
        if isinstance(source, str | Path) and str(source):
            return str(source)
        if isinstance(source, Sequence) and source and all(isinstance(text, str) for text in source):
            return list(source)
        raise ConfigError(
            f"calibration is a {type(source).__name__}, wanted 'default', 'self', a file, a data set or strings"
        )

    def scheme(self, out_features: int, in_features: int, bits: float | None = None) -> TensorScheme:
        """Scheme for a new weight of the given shape, at a rate of its own if `bits` is given."""
        hyperfunction = hyperfunctions.get(self.hyperfunction)
        bits, options = hyperfunction.resolve(self.bits if bits is None else bits, self._options())
        plain = self.calibration is not None and self.rounding == "plain"
        width = padded(in_features)
        return TensorScheme(
            hyperfunction=self.hyperfunction,
            input_blocks=width // (width & -width) if plain else 1,
            bits=bits,
            out_features=out_features,
            in_features=in_features,
            incoherence=hyperfunction.incoherence or bool(self._options().get("incoherence")),
            seed=self.seed,
            options=options,
        )

    @property
    def bits_follow_loss(self) -> bool:
        """Whether rates are chosen by the loss that is expected of them."""
        return self.allocation != "size" and self._knows_loss

    @property
    def _knows_loss(self) -> bool:
        return self.calibration is not None and self.rounding in WITH_GRADIENTS

    @property
    def loss_max(self) -> float | None:
        """Bound on the mean absolute error of a tensor, None where there is none."""
        return self.winding.loss_max if isinstance(self.winding, WindingOptions) else None

    def record(self, name: str, scheme: TensorScheme, layout: Layout | None = None) -> None:
        """Note in `tensor_schemes` how module `name` is stored; the shape of its weight is that of the module."""
        fields = dataclasses.asdict(scheme)
        fields["options"] = dict(scheme.options)
        recorded = {key: fields[key] for key in _RECORDED if fields[key] != _DEFAULTS.get(key)}
        self.tensor_schemes[name] = recorded if layout is None else {**recorded, **layout.fields()}

    def recorded_layout(self, name: str, shape: tuple[int, ...]) -> Layout:
        """Layout of the compressed module `name`, whose weight has the given shape."""
        return Layout.from_fields(shape, self.tensor_schemes[name])

    def recorded(self, name: str, *shape: int) -> TensorScheme:
        """Scheme of the compressed module `name`, whose weight has the given shape.

        Raises:
            FormatError: The record has fields that this version does not know.
        """
        fields = {**_DEFAULTS, **self.tensor_schemes[name]}
        unknown = sorted(set(fields) - set(_RECORDED) - set(_LAYOUT))
        if unknown:
            raise FormatError(f"{name}: scheme has unknown fields {unknown}; upgrade with pip install -U hf-hyper")
        if "bits" not in fields:
            raise FormatError(f"{name}: scheme has no field 'bits'; config.json is damaged: fetch the folder again")
        options = tuple(sorted(fields["options"].items()))
        rows, columns = self.recorded_layout(name, shape).matrix
        scheme = {key: fields[key] for key in _RECORDED if key != "options"}
        return TensorScheme(out_features=rows, in_features=columns, options=options, **scheme)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `config.json`; options left at None are left out."""
        values = {key: value for key, value in self.__dict__.items() if value is not None}
        if self.max_kl is not None and not self.tensor_schemes:
            values["bits"] = "auto"  # until it is known
        values["tensor_schemes"] = {name: dict(fields) for name, fields in self.tensor_schemes.items()}
        if isinstance(self.calibration, list):
            values["calibration"] = f"{len(self.calibration)} texts"
        if isinstance(self.winding, WindingOptions):
            values["winding"] = dataclasses.asdict(self.winding)
        return values

    def _options(self) -> dict[str, object]:
        return dataclasses.asdict(self.winding) if isinstance(self.winding, WindingOptions) else {}


HyperCompressionConfig = HyperConfig

_RECORDED = ("hyperfunction", "bits", "incoherence", "input_blocks", "seed", "options")
_LAYOUT = ("rows", "pruned", "experts")
_DEFAULTS: dict[str, Any] = {
    "hyperfunction": "shift",
    "incoherence": True,
    "input_blocks": 1,
    "seed": 0,
    "options": {},
}


def _check_version(version: int) -> None:
    if not isinstance(version, int) or version < 1:
        raise FormatError(f"format_version is {version!r}, wanted a positive integer; config.json is damaged")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"this model is stored in format version {version}, and this hf_hyper reads versions up to "
            f"{FORMAT_VERSION}; upgrade with: pip install -U hf-hyper"
        )


def _winding_options(winding: "WindingOptions | Mapping[str, Any] | None") -> WindingOptions | None:
    if winding is None or isinstance(winding, WindingOptions):
        return winding
    try:
        return WindingOptions(**winding)
    except TypeError as error:
        known = [field.name for field in dataclasses.fields(WindingOptions)]
        raise ConfigError(f"winding is {winding!r}, wanted a dict with keys from {known} ({error})") from error
