"""Writes the golden files of the current format version that do not exist yet: `python tests/golden/make.py`.

Each file holds the stored tensors of one small weight, the weight that they stood for on that day, and the scheme as
metadata, with the shape and the record of the layout where the matrix is not the weight. Files that exist are never
written again; every later version must decode them.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_hyper import HyperConfig, codec
from hf_hyper.config import FORMAT_VERSION
from hf_hyper.layout import MASK
from hf_hyper.plan import Plan, plan_shape, plan_weight
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
    for dimension in (1, 3, 4):
        options = {"dimension": dimension, "direction": "plastic"}
        cases[f"winding-{dimension}d"] = HyperConfig(bits=4, hyperfunction="winding", winding=options).scheme(6, 13)
    options = {"incoherence": True, "group_size": 8}
    cases["winding-scales"] = HyperConfig(bits=4, hyperfunction="winding", winding=options).scheme(20, 24)
    return cases


def plans() -> dict[str, tuple[Plan, torch.Tensor]]:
    """One plan and weight for every rule of the section "Layout"."""
    depthwise, weight = (96, 1, 3, 3), torch.randn(32, 16, 3, 3) * 0.1
    shape_plan = plan_shape(HyperConfig(bits=4), depthwise, reshapable=True)
    assert shape_plan is not None
    cases = {"shift-rows": (shape_plan, torch.randn(depthwise) * 0.1)}
    for name, density, config in (
        ("shift-pruned", 0.2, HyperConfig(bits=4)),
        ("winding-pruned", 0.05, HyperConfig(bits=6, hyperfunction="winding")),
    ):
        sparse = torch.where(torch.rand(weight.shape) < density, weight, 0.0)
        plan = plan_shape(config, tuple(weight.shape), reshapable=True)
        assert plan is not None
        cases[name] = (plan_weight(config, sparse, plan), sparse)
    torch.manual_seed(2)
    for name, config in (
        ("shift-experts", HyperConfig(bits=3, seed=11)),
        ("winding-experts", HyperConfig(bits=4, hyperfunction="winding")),
    ):
        bank = torch.randn(3, 20, 40) * torch.tensor([0.1, 1.0, 0.01]).view(3, 1, 1)
        plan = plan_shape(config, tuple(bank.shape), reshapable=False, experts=True)
        assert plan is not None
        cases[name] = (plan, bank)
    return cases


def main() -> None:
    """Write every case that has no file."""
    FOLDER.mkdir(exist_ok=True)
    torch.manual_seed(FORMAT_VERSION)
    for name, (plan, weight) in plans().items():
        if (FOLDER / f"{name}.safetensors").exists():
            continue
        tensors = plan.quantize(weight, "best")
        names = codec.tensor_specs(plan.scheme)
        if plan.layout.experts is not None:
            banks = [{key: tensors[key][expert] for key in names} for expert in range(plan.layout.experts)]
            expected = torch.stack([codec.dequantize(own, plan.scheme) for own in banks])
        else:
            matrix = codec.dequantize({key: tensors[key] for key in names}, plan.scheme)
            expected = plan.layout.from_matrix(matrix, tensors.get(MASK)).contiguous()
        layout = {"shape": list(weight.shape), **plan.layout.fields()}
        metadata = {"scheme": plan.scheme.key, "layout": json.dumps(layout)}
        save_file({**tensors, "expected": expected}, FOLDER / f"{name}.safetensors", metadata)
    for name, scheme in schemes().items():
        if (FOLDER / f"{name}.safetensors").exists():
            continue
        tensors = codec.quantize(torch.randn(scheme.out_features, scheme.in_features) * 0.1, scheme, "best")
        decoded = codec.dequantize(tensors, scheme)
        save_file({**tensors, "expected": decoded.contiguous()}, FOLDER / f"{name}.safetensors", {"scheme": scheme.key})


if __name__ == "__main__":
    main()
