"""Speed of products of activations with compressed weights, against `F.linear` on uncompressed weights.

    python -m hf_hyper.bench.matmul [--json OUT [--append]] [--shapes 4096x4096 ...] [--bits 2 3 4 8] [--m 1 4 16 64]
    python -m hf_hyper.bench.matmul --device cuda [--json OUT] ...

Shapes are the linear layers of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B. Codes are random bits: any bit string is
a valid code and takes the same time. `shift` comes at each of the rates, `winding` at the paper's setting, 13 bits a
pair. Every case is checked against the reference before it is timed; a wrong result ends the run. Rows give seconds per
call, the baseline's time over ours (median, minimum and maximum over interleaved turns), the bytes of stored tensors
read per second and their share of measured read bandwidth. Kernels are the path that the operator takes, with
activations in bfloat16, `exact` or `int8`; rotations are included. GPUs run `matmul_gpu.py`.

Baselines of 4 bits in groups of 64, whatever the bits of the row: torch's own int4 kernel (on GPUs the one that torchao
calls; torchao has no int4 weight-only layout that multiplies on an x86 CPU, 0.18), and, where they are installed,
bitsandbytes' nf4 and HQQ. Those that fail to be set up are named and left out.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_hyper import _native, codec, hyperfunctions
from hf_hyper.bench import matmul_gpu
from hf_hyper.bench.harness import CACHE_BYTES, PAPER, compare, environment, random_tensors, ratios, read_bandwidth
from hf_hyper.errors import HyperError, KernelUnavailable
from hf_hyper.kernels import cpu, cpu_winding, reference
from hf_hyper.pipeline.report import write_json
from hf_hyper.scheme import TensorScheme

__all__ = ["SHAPES", "case", "main", "schemes"]

SHAPES = {
    "SmolLM2-135M": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
    "Llama-3.2-1B": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "Llama-3.1-8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
}
"""`(out_features, in_features)` of the linear layers of one decoder block."""

MAX_ERROR = {"exact": 0.01, "int8": 0.015}
"""Relative error above which a result is wrong rather than rounded: bfloat16 output alone costs 0.002."""

Row = dict[str, Any]


def schemes(rows: int, columns: int, rates: Sequence[int]) -> list[TensorScheme]:
    """What is timed of one shape: `shift` at every rate, then `winding` at the paper's setting."""
    bits, constants = hyperfunctions.get("winding").resolve(6.5, PAPER)
    return [
        *(TensorScheme("shift", float(rate), rows, columns) for rate in rates),
        TensorScheme("winding", bits, rows, columns, incoherence=False, options=constants),
    ]


def case(scheme: TensorScheme, tokens: Sequence[int], turns: int, bandwidth: float) -> Iterator[Row]:
    """Rows of one weight: every number of tokens, the accuracies that there are, all baselines.

    Args:
        scheme: Shape and way of storage.
        tokens: Numbers of tokens.
        turns: Interleaved turns.
        bandwidth: Bytes per second that memory delivers.

    Raises:
        HyperError: A result is wrong.
    """
    rows, columns = scheme.out_features, scheme.in_features
    stored = [random_tensors(scheme) for _ in range(_copies(codec.bits_per_weight(scheme) / 8, scheme))]
    bfloat16 = [torch.randn(rows, columns).bfloat16() for _ in range(_copies(2, scheme))]
    float32 = [torch.randn(rows, columns) for _ in range(_copies(4, scheme))]
    size = codec.bits_per_weight(scheme) / 8 * scheme.num_weights
    rivals = _rivals(rows, columns, "cpu")
    weight = reference.decode(stored[0], scheme, torch.float32)
    multiply = cpu.matmul_shift if scheme.hyperfunction == "shift" else cpu_winding.matmul_winding
    for count in tokens:
        x = torch.randn(count, columns).bfloat16()
        full = x.float()
        ways = _ways(count, x.dtype, scheme)

        def ours(accuracy: str, number: int, x: Tensor = x) -> Tensor:
            cpu.set_activations(accuracy)
            return multiply(x, stored[number % len(stored)], scheme)

        wanted = linear(full, weight)
        for accuracy in ways:
            error = float((ours(accuracy, 0).float() - wanted).norm() / wanted.norm())
            if not error < MAX_ERROR[accuracy]:
                raise HyperError(f"{scheme.key}, {count} tokens, {accuracy}: relative error {error:.3g}; run the tests")
        times = compare(
            {
                "F.linear bfloat16": lambda number, x=x: linear(x, bfloat16[number % len(bfloat16)]),
                "F.linear float32": lambda number, full=full: linear(full, float32[number % len(float32)]),
                **{name: lambda number, x=x, rival=rival: rival(number, x) for name, rival in rivals.items()},
                **{accuracy: functools.partial(ours, accuracy) for accuracy in ways},
            },
            turns,
        )
        for accuracy, way in ways.items():
            median = statistics.median(times[accuracy])
            for baseline in ("F.linear bfloat16", "F.linear float32", *rivals):
                yield {
                    "op": "matmul",
                    "shape": [rows, columns],
                    "M": count,
                    "bits": scheme.bits,
                    "kernel": f"cpu.{multiply.__name__} {way} {_native.matmul_isa()} {accuracy}",
                    "baseline": baseline,
                    "seconds_median": median,
                    "baseline_seconds_median": statistics.median(times[baseline]),
                    **ratios(times[baseline], times[accuracy]),
                    "gigabytes_per_second": size / median / 1e9,
                    "bandwidth_share": size / median / bandwidth,
                    "threads": torch.get_num_threads(),
                }


def _ways(tokens: int, dtype: torch.dtype, scheme: TensorScheme) -> dict[str, str]:
    """How the product is done, by the accuracies that there are."""
    if scheme.hyperfunction != "shift":
        return {"exact": cpu_winding.way(tokens, dtype)}
    found = {}
    for wanted in ("exact", "int8"):
        cpu.set_activations(wanted)
        way, accuracy = cpu.way(tokens, dtype, scheme)
        found[accuracy] = way
    return found


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m hf_hyper.bench.matmul", description="Speed of products.")
    parser.add_argument("--json", type=Path, help="write rows to this file, weight by weight")
    parser.add_argument("--append", action="store_true", help="add to the rows that the file has: a run in pieces")
    parser.add_argument("--shapes", nargs="+", type=_shape, help="rows x columns, such as 4096x4096; default: all")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8], help="bits per weight of shift")
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64, 512], help="numbers of tokens")
    parser.add_argument("--turns", type=int, default=7, help="interleaved turns")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and the core")
    given = parser.parse_args(arguments)
    on_gpu = torch.device(given.device).type == "cuda"
    if not on_gpu and _native.load() is None:
        raise KernelUnavailable(f"bench.matmul times the compiled core: {_native.unavailable_reason()}")
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    bandwidth = read_bandwidth(given.threads, device=given.device)
    machine = environment(device=given.device)["device"]
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, {given.threads} threads, {machine}")
    rows: list[Row] = json.loads(given.json.read_text()) if given.append and given.json.exists() else []
    for height, width in given.shapes or [shape for shapes in SHAPES.values() for shape in shapes]:
        for scheme in schemes(height, width, given.bits):
            if not on_gpu:
                found = case(scheme, given.m, given.turns, bandwidth)
            else:
                rivals = _rivals(height, width, given.device)
                found = matmul_gpu.case(scheme, given.m, given.turns, bandwidth, rivals, given.device)
            for row in found:
                facts = environment("bitsandbytes", "hqq", device=given.device)
                rows.append({**row, "read_bandwidth": bandwidth, **facts})
                print(_line(row), flush=True)
            if given.json:
                write_json(given.json, rows)
    return 0


def _rivals(rows: int, columns: int, device: str) -> dict[str, Callable[[int, Tensor], Tensor]]:
    """Products of other packages that are installed: functions of the number of the call and bfloat16 activations."""
    found: dict[str, Callable[[int, Tensor], Tensor]] = {}
    if columns % 64:
        return found
    weight = torch.randn(rows, columns).bfloat16() / columns**0.5
    copies = max(2, int(CACHE_BYTES / (0.5625 * rows * columns)) + 1)
    for name, package, make in (
        ("torch int4", "torch", _torch_int4),
        ("bitsandbytes nf4", "bitsandbytes", _nf4),
        ("HQQ 4 bits", "hqq", _hqq),
    ):
        if importlib.util.find_spec(package):
            try:
                found[name] = make(weight, copies, device)
            except (RuntimeError, ImportError, AttributeError, NotImplementedError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def _torch_int4(weight: Tensor, copies: int, device: str) -> Callable[[int, Tensor], Tensor]:
    rows, columns = weight.shape
    if torch.device(device).type == "cpu":
        nibbles = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        multiply, packed = (
            torch.ops.aten._weight_int4pack_mm_for_cpu,
            [torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 2).clone() for _ in range(copies)],
        )
    else:
        pairs = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
        multiply, packed = (
            torch.ops.aten._weight_int4pack_mm,
            [torch.ops.aten._convert_weight_to_int4pack(pairs, 8).clone() for _ in range(copies)],
        )
    scales_and_zeros = torch.full((columns // 64, rows, 2), 0.01, dtype=torch.bfloat16, device=device)
    return lambda number, x: multiply(x, packed[number % copies], 64, scales_and_zeros)


def _nf4(weight: Tensor, copies: int, device: str) -> Callable[[int, Tensor], Tensor]:
    bitsandbytes = importlib.import_module("bitsandbytes")
    layers = []
    for _ in range(copies):
        layer = bitsandbytes.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=False,
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=False, module=layer
        )
        layers.append(layer.to(device))
    return lambda number, x: layers[number % copies](x)


def _hqq(weight: Tensor, _: int, device: str) -> Callable[[int, Tensor], Tensor]:
    quantize = importlib.import_module("hqq.core.quantize")
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    plain.weight.data.copy_(weight)
    dial = quantize.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    layer = quantize.HQQLinear(plain, dial, compute_dtype=torch.bfloat16, device=device, del_orig=False)
    return lambda number, x: layer(x)


def _copies(bytes_per_weight: float, scheme: TensorScheme) -> int:
    return max(2, int(CACHE_BYTES / (bytes_per_weight * scheme.num_weights)) + 1)


def _shape(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def _line(row: Row) -> str:
    return (
        f"{row['shape'][0]:>6} x {row['shape'][1]:<6} {row['bits']:g} bits  M={row['M']:<4} {row['kernel']:<36} "
        f"{row['seconds_median'] * 1e3:8.3f} ms  {row['gigabytes_per_second']:5.1f} GB/s "
        f"({row['bandwidth_share']:4.0%})  {row['baseline']:<18} x{row['ratio_median']:.2f} "
        f"[{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
    )


if __name__ == "__main__":
    raise SystemExit(main())
