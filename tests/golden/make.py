"""Writes the golden files of the current format version: `python tests/golden/make.py` once, when a version is made.

Each file holds the stored tensors of one small weight, the weight that they stood for on that day, and the scheme as
metadata. Files of a released version are never written again; every later version must decode them.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_hyper import HyperConfig, codec
from hf_hyper.config import FORMAT_VERSION
from hf_hyper.scheme import TensorScheme

FOLDER = Path(__file__).parent / f"format{FORMAT_VERSION}"


def schemes() -> dict[str, TensorScheme]:
    """One scheme for every rule of FORMAT.md."""
    cases = {f"shift{bits}": TensorScheme("shift", float(bits), 16, 32) for bits in range(1, 9)}
    cases["shift-padded"] = TensorScheme("shift", 3.0, 20, 40, seed=2**63 + 1)
    cases["shift-blocks"] = TensorScheme("shift", 2.0, 16, 96, input_blocks=2, seed=7)
    cases["shift-plain"] = TensorScheme("shift", 2.0, 10, 20, incoherence=False)
    cases["winding-paper"] = HyperConfig(
        hyperfunction="winding", winding={"num_points": 1600, "num_shells": 3, "box_side": 0.1, "direction": "lattice"}
    ).scheme(6, 13)
    cases["winding4"] = HyperConfig(bits=4, hyperfunction="winding").scheme(6, 12)
    return cases


def main() -> None:
    """Write every case."""
    FOLDER.mkdir(exist_ok=True)
    torch.manual_seed(FORMAT_VERSION)
    for name, scheme in schemes().items():
        tensors = codec.quantize(torch.randn(scheme.out_features, scheme.in_features) * 0.1, scheme, "best")
        decoded = codec.dequantize(tensors, scheme)
        save_file({**tensors, "expected": decoded.contiguous()}, FOLDER / f"{name}.safetensors", {"scheme": scheme.key})


if __name__ == "__main__":
    main()
