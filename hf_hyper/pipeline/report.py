"""What a compressed model consists of: size, rate and error of every tensor, with all overheads.

Shapes and sizes come from `config.json` and the headers of the safetensors files, so a model on the Hub can be
described without its weights. Errors and times are known only to the compression itself, which leaves them in
`hyper_report.json`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from hf_hyper.config import HyperConfig
from hf_hyper.errors import FormatError
from hf_hyper.layout import Layout
from hf_hyper.nn.experts import FUSED, split_experts
from hf_hyper.nn.replace import hyper_modules, weight_shape
from hf_hyper.nn.stored import layer_specs
from hf_hyper.pipeline.headers import hub_headers, local_headers
from hf_hyper.pipeline.source import model_class, read_config
from hf_hyper.plan import bits_per_weight
from hf_hyper.scheme import TensorScheme

__all__ = ["REPORT_NAME", "Report", "TensorRecord", "summarize", "write_json"]

REPORT_NAME = "hyper_report.json"


@dataclass(frozen=True)
class TensorRecord:
    """One compressed weight.

    Attributes:
        name: Name of the module.
        shape: Of the weight: `(out_features, in_features)` of a linear layer, with the number of experts in front for
            the weights of experts.
        hyperfunction: How it is stored.
        bits: Code bits per weight.
        bits_per_weight: Stored bits per weight with scales, constants and padding.
        relative_error: `||W - W'||² / ||W||²`, None where it was not measured.
        output_error: `E|(W - W') x|² / E|W x|²` over the calibration text, None without one.
        expected_loss: Divergence from the original model, in nats a token, that was expected of this weight's rounding
            when its rate was chosen by loss, else None.
        seconds: Time to compress it, None where it was not measured.
    """

    name: str
    shape: tuple[int, ...]
    hyperfunction: str
    bits: float
    bits_per_weight: float
    relative_error: float | None = None
    output_error: float | None = None
    expected_loss: float | None = None
    seconds: float | None = None

    @property
    def num_weights(self) -> int:
        """Weights of the layer."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Report:
    """A model's compressed tensors and what surrounds them.

    Attributes:
        tensors: Compressed weights in model order.
        uncompressed_tensors: Number of the other stored tensors.
        uncompressed_weights: Their elements.
        uncompressed_bytes: Their bytes.
        size_bytes: Size of the weight files; for a model in memory or on the Hub, of its tensors.
    """

    tensors: list[TensorRecord]
    uncompressed_tensors: int
    uncompressed_weights: int
    uncompressed_bytes: int
    size_bytes: int

    @property
    def compressed_weights(self) -> int:
        """Weights of all compressed tensors, padding not counted."""
        return sum(record.num_weights for record in self.tensors)

    @property
    def compressed_bytes(self) -> int:
        """Bytes of all compressed tensors."""
        return round(sum(r.bits_per_weight * r.num_weights for r in self.tensors) / 8)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per weight over the compressed tensors, None where there are none."""
        return 8 * self.compressed_bytes / self.compressed_weights if self.tensors else None

    @property
    def bytes_16bit(self) -> int:
        """Size of the same model with 16 bits for every weight."""
        return 2 * (self.compressed_weights + self.uncompressed_weights)

    @property
    def relative_error(self) -> float | None:
        """Mean of the tensors' relative errors, weighted by their sizes; None unless all are known."""
        known = [(r.relative_error, r.num_weights) for r in self.tensors if r.relative_error is not None]
        if not known or len(known) < len(self.tensors):
            return None
        return sum(error * size for error, size in known) / self.compressed_weights

    @property
    def expected_loss(self) -> float | None:
        """Sum over the tensors; None unless all are known."""
        known = [r.expected_loss for r in self.tensors if r.expected_loss is not None]
        return sum(known) if known and len(known) == len(self.tensors) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "totals": {
                "compressed_tensors": len(self.tensors),
                "compressed_weights": self.compressed_weights,
                "compressed_bytes": self.compressed_bytes,
                "bits_per_weight": self.bits_per_weight,
                "relative_error": self.relative_error,
                "uncompressed_tensors": self.uncompressed_tensors,
                "uncompressed_weights": self.uncompressed_weights,
                "uncompressed_bytes": self.uncompressed_bytes,
                "size_bytes": self.size_bytes,
                "ratio_to_16bit": self.bytes_16bit / self.size_bytes,
            },
            "tensors": [dataclasses.asdict(record) for record in self.tensors],
        }


def summarize(model: nn.Module | str | Path, measured: Mapping[str, Mapping[str, float]] | None = None) -> Report:
    """Describe a model in memory, in a folder or on the Hub; of the latter two only headers are read.

    Args:
        model: Model, folder or Hub id; one without compressed tensors is fine.
        measured: `relative_error` and `seconds` by module name. Unless given, they come from the model's quantizer or
            the folder's `hyper_report.json`.

    Raises:
        FormatError: There are no safetensors files, or modules that the config names do not exist.
    """
    if isinstance(model, nn.Module):
        own = getattr(getattr(model, "hf_quantizer", None), "measured", {})
        return _summarize_module(model, own if measured is None else measured)
    config = read_config(model)
    folder = Path(model)
    if constants.HF_HUB_OFFLINE and not folder.is_dir():
        folder = Path(snapshot_download(str(model), local_files_only=True))
    headers, size = local_headers(folder) if folder.is_dir() else hub_headers(str(model))
    if measured is None:
        measured = _read_measured(folder)
    schemes = _schemes(config)
    stored = _stored_names(config, schemes)
    others = [header for name, header in headers.items() if name not in stored]
    return Report(
        tensors=[_record(name, *stored_as, measured) for name, stored_as in schemes.items()],
        uncompressed_tensors=len(others),
        uncompressed_weights=sum(weights for weights, _ in others),
        uncompressed_bytes=sum(size for _, size in others),
        size_bytes=size,
    )


def write_json(path: str | Path, values: Any) -> None:
    """Write JSON, lists one entry a line. The file is complete whenever it exists; missing folders are made."""
    path = Path(path)
    rows = isinstance(values, list)
    text = "[\n" + ",\n".join(map(json.dumps, values)) + "\n]" if rows else json.dumps(values, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def _record(
    name: str, scheme: TensorScheme, layout: Layout, measured: Mapping[str, Mapping[str, float]]
) -> TensorRecord:
    return TensorRecord(
        name=name,
        shape=layout.shape,
        hyperfunction=scheme.hyperfunction,
        bits=scheme.bits,
        bits_per_weight=bits_per_weight(scheme, layout),
        relative_error=measured.get(name, {}).get("relative_error"),
        output_error=measured.get(name, {}).get("output_error"),
        expected_loss=measured.get(name, {}).get("expected_loss"),
        seconds=measured.get(name, {}).get("seconds"),
    )


def _summarize_module(model: nn.Module, measured: Mapping[str, Mapping[str, float]]) -> Report:
    layers = dict(hyper_modules(model))
    coded = {id(tensor) for layer in layers.values() for tensor in layer.stored()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in coded]
    kept = model.state_dict(keep_vars=True).keys()
    others += [buffer for name, buffer in model.named_buffers() if name in kept]
    tensors = [_record(name, layer.scheme, layer.layout, measured) for name, layer in layers.items()]
    size = sum(tensor.nbytes for tensor in others)
    codes = sum(tensor.nbytes for layer in layers.values() for tensor in layer.stored())
    return Report(tensors, len(others), sum(tensor.numel() for tensor in others), size, size + codes)


def _schemes(config: PreTrainedConfig) -> dict[str, tuple[TensorScheme, Layout]]:
    """Scheme and layout of every compressed module; the skeleton of the model on the meta device tells their shapes."""
    fields = getattr(config, "quantization_config", None) or {}
    if fields.get("quant_method") != "hyper":
        return {}
    hyper = HyperConfig(**fields)
    del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    with torch.device("meta"):
        skeleton = model_class(config)._from_config(config)
    split_experts(skeleton)
    shapes = {name: weight_shape(module) for name, module in skeleton.named_modules()}
    schemes = {}
    for name in hyper.tensor_schemes:
        shape = shapes.get(name)
        if shape is None:
            raise FormatError(
                f"config.json names the compressed module {name!r}, which {type(skeleton).__name__} does not have as "
                "a layer that can be stored; the folder is damaged or needs another version of transformers"
            )
        schemes[name] = hyper.recorded(name, *shape), hyper.recorded_layout(name, shape)
    return schemes


def _stored_names(config: PreTrainedConfig, schemes: Mapping[str, tuple[TensorScheme, Layout]]) -> set[str]:
    """Names in files of all tensors of compressed modules, the sentinel among them.

    transformers saves some models under other names than their modules have, and renames ours with them.
    """
    with torch.device("meta"):
        skeleton = model_class(config)._from_config(config)
    nothing = torch.empty(0, device="meta")
    tensors: dict[str, Tensor] = {}
    for name, stored_as in schemes.items():
        tensors |= {f"{name}.{key}": nothing for key in layer_specs(*stored_as)}
        if stored_as[1].experts is None:
            tensors[f"{name}.weight"] = nothing  # the sentinel, or its place
        else:
            owner, _, bank = name.rpartition(".")
            fused = f"{owner}.{FUSED[bank]}"
            tensors[fused] = skeleton.get_parameter(fused)
    return set(revert_weight_conversion(skeleton, tensors))


def _read_measured(source: Path) -> dict[str, dict[str, float]]:
    """Errors and times that the compression left, nothing where there is no report."""
    path = source / REPORT_NAME
    if not source.is_dir():
        try:
            path = Path(hf_hub_download(str(source), REPORT_NAME))
        except EntryNotFoundError:
            return {}
    if not path.is_file():
        return {}
    return {record["name"]: record for record in json.loads(path.read_text(encoding="utf-8"))["tensors"]}
