"""Whole models through `generate`: tokens per second, time to the first token, peak memory.

    python -m hf_hyper.bench.generate --model DIR [--compressed DIR] [--gguf NAME=FILE ...] [--json OUT]
    python -m hf_hyper.bench.generate --shape llama-1b [--bits 4] [--json OUT]
    python -m hf_hyper.bench.generate --shape llama-8b --device cuda --compile [--bits 4] [--json OUT]

`--model` is an uncompressed folder and `--compressed` the same model compressed. `--shape` needs no files: a model of
the shape of Llama-3.2-1B or Llama-3.1-8B whose weights and codes are random bits, which take as long as any others.
Every contender loads and runs in a process of its own, so that its peak memory is its own (on a GPU that of torch's
allocator there); processes take turns, and ratios are taken turn by turn. A step decodes one token at batch 1 after a
prompt of 32; greedy, of a fixed length, with transformers' default cache, or with `--compile` its static cache and a
compiled forward pass.

| contender | what it is |
|---|---|
| `float32`, `bfloat16` | the uncompressed model in that dtype |
| `exact`, `int8` | the compressed model in bfloat16, by accuracy of the rotated activations |
| `exact head`, `int8 head` | with `--shape`: the output head compressed too, untied from the embedding |
| `llama.cpp NAME` | a GGUF file through llama-cpp-python, if it is installed for `--llama-python` |

A contender that cannot run gives a row with the reason in `skipped`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_hyper.bench.harness import environment, ratios, read_bandwidth
from hf_hyper.config import HyperConfig
from hf_hyper.layout import Layout
from hf_hyper.nn.replace import hyper_modules, replace
from hf_hyper.nn.stored import layer_specs
from hf_hyper.pipeline.report import write_json
from hf_hyper.plan import plan_shape
from hf_hyper.scheme import TensorScheme

__all__ = ["main", "measure", "random_model"]

PROMPT = 32

LEAD = 4
"""Steps of every call that do not count: a call has a cache of its own, for which graphs are captured once more."""

SHAPES = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
}
"""Architectures for random weights, from the config.json of Llama-3.2-1B and Llama-3.1-8B."""

_LLAMA_WORKER = Path(__file__).with_name("llama_cpp_worker.py")
_UNCOMPRESSED = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ACCURACIES = ("exact", "int8")
_WITH_HEAD = tuple(f"{accuracy} head" for accuracy in _ACCURACIES)
_OURS = (*_ACCURACIES, *_WITH_HEAD)

Row = dict[str, Any]


def random_model(
    shape: str, dtype: torch.dtype, bits: float | None, device: str = "cpu", *, compress_head: bool = False
) -> PreTrainedModel:
    """Model of an architecture in `SHAPES` with random weights.

    Args:
        shape: Key of `SHAPES`.
        dtype: Of everything that is not compressed.
        bits: Bits per weight of random codes; None leaves the model uncompressed.
        device: Where it is made.
        compress_head: Untie the output head from the embedding, which stays as it is, and compress the head as well.
    """
    config = LlamaConfig(**SHAPES[shape])
    if compress_head:
        config.tie_word_embeddings = False
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)  # pyright: ignore[reportArgumentType]
        if bits is not None:
            kept = None if compress_head else model.get_output_embeddings()
            dial = HyperConfig(bits=bits)

            def choose(_: str, module: nn.Module, shape: tuple[int, ...]) -> tuple[TensorScheme, Layout] | None:
                plan = plan_shape(dial, shape, reshapable=False) if isinstance(module, nn.Linear) else None
                return None if plan is None or module is kept else (plan.scheme, plan.layout)

            replace(model, choose, dtype=dtype, placeholder=False)
    rotary = type(model.model.rotary_emb)
    model.to_empty(device=device)
    model.model.rotary_emb = rotary(config).to(device)  # its buffers are computed, not stored
    model.tie_weights()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            nn.init.uniform_(parameter, -0.02, 0.02)
    for _, layer in hyper_modules(model):
        for name, stored in layer_specs(layer.scheme, layer.layout).items():
            codes = torch.randint(-(2**31), 2**31 - 1, stored.shape, dtype=torch.int32, device=device)
            ones = torch.full(stored.shape, 0.02, dtype=stored.dtype, device=device)
            layer.store({name: codes if name == "codes" else ones})
    return model.eval()


def measure(model: PreTrainedModel, tokens: int, repeats: int, *, compiled: bool = False) -> dict[str, Any]:
    """Seconds of a step and of the first token, one entry a repeat.

    Args:
        model: A causal language model.
        tokens: Steps that are timed.
        repeats: Repeats, after one that is not counted.
        compiled: Static cache; transformers then compiles the forward pass, on GPUs into CUDA graphs.
    """
    options = {"cache_implementation": "static"} if compiled else {}
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(model.device)
    mask = torch.ones_like(prompt)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(  # pyright: ignore[reportCallIssue]
                prompt,
                attention_mask=mask,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        if prompt.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds(1 + LEAD + tokens if compiled else 2)  # the longest cache is compiled for, and later ones are as long
    first, step = [], []
    for _ in range(repeats):
        first.append(seconds(1))
        short = seconds(1 + LEAD)
        step.append((seconds(1 + LEAD + tokens) - short) / tokens)
    return {"first_token": first, "step": step, "bytes_read": _bytes_read(model)}


def _bytes_read(model: PreTrainedModel) -> int:
    """Bytes of weights that a step reads: all but the input embedding, unless it is the output head as well."""
    embedding = model.get_input_embeddings().get_parameter("weight")
    head = model.get_output_embeddings()
    tied = head is not None and head._parameters.get("weight") is embedding
    skipped = 0 if tied else embedding.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - skipped


def _load(given: argparse.Namespace, contender: str) -> PreTrainedModel:
    dtype = _UNCOMPRESSED.get(contender, torch.bfloat16)
    if given.shape:
        bits = None if contender in _UNCOMPRESSED else given.bits
        return random_model(given.shape, dtype, bits, given.device, compress_head=contender in _WITH_HEAD)
    folder = given.model if contender in _UNCOMPRESSED else given.compressed
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(given.device)


def _work(given: argparse.Namespace) -> None:
    """Measure one contender in this process and print the result as one line of JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    found = measure(_load(given, given.worker), given.tokens, given.repeats, compiled=given.compile)
    if _on_gpu(given):
        peak = torch.cuda.max_memory_allocated(given.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({**found, "peak_bytes": peak}))


def _on_gpu(given: argparse.Namespace) -> bool:
    return torch.device(given.device).type == "cuda"


def _run(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Last line of a worker's output, or `skipped` with the last line of its errors."""
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if finished.returncode:
        return {"skipped": (finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"])[-1]}
    return json.loads(finished.stdout.strip().splitlines()[-1])


def _commands(given: argparse.Namespace) -> dict[str, tuple[list[str], dict[str, str]]]:
    common = [f"--{name}={getattr(given, name)}" for name in ("tokens", "repeats", "threads", "device")]
    if given.compile:
        common.append("--compile")
    source = [f"--shape={given.shape}", f"--bits={given.bits}"] if given.shape else [f"--model={given.model}"]
    if given.compressed:
        source.append(f"--compressed={given.compressed}")
    own = [sys.executable, "-m", "hf_hyper.bench.generate", *common, *source]
    ours = _OURS if given.shape else _ACCURACIES if given.compressed else ()
    if _on_gpu(given):
        ours = tuple(name for name in ours if name.startswith(_ACCURACIES[0]))  # the other is for CPUs
    commands = {name: ([*own, f"--worker={name}"], {"HF_HYPER_ACTIVATIONS": name.split()[0]}) for name in ours}
    uncompressed = [name for name in _UNCOMPRESSED if name == "bfloat16" or not _on_gpu(given)]
    commands |= {name: ([*own, f"--worker={name}"], {}) for name in uncompressed}
    for named in given.gguf:
        name, _, file = named.partition("=")
        arguments = [file, given.tokens, given.repeats, given.threads, PROMPT]
        commands[f"llama.cpp {name}"] = ([given.llama_python, str(_LLAMA_WORKER), *map(str, arguments)], {})
    return commands


def compare(given: argparse.Namespace) -> list[Row]:
    """Rows of all contenders against every other that is not ours; see the module."""
    commands = _commands(given)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for turn in range(given.turns):
        for name, (command, variables) in commands.items():
            turns[name].append(_run(command, variables))
            print(f"turn {turn + 1}: {name} {_summary(turns[name][-1])}", file=sys.stderr, flush=True)
    bandwidth = read_bandwidth(given.threads, device=given.device)
    rows: list[Row] = []
    facts = {"threads": given.threads, "read_bandwidth": bandwidth, **environment("transformers", device=given.device)}
    facts["compiled"] = given.compile
    label = given.shape or Path(given.model).name
    bits = _bits(given)
    if not given.gguf:
        turns["llama.cpp"] = [{"skipped": "no GGUF file given; name one with --gguf NAME=FILE"}]
    for name, found in turns.items():
        base = {"op": "generate", "shape": label, "M": 1, "bits": bits if name in _OURS else None}
        failed = next((result["skipped"] for result in found if "skipped" in result), None)
        if failed is not None:
            rows.append({**base, "kernel": name, "baseline": None, "skipped": failed, **facts})
            continue
        steps = [statistics.median(result["step"]) for result in found]
        step, read = statistics.median(steps), found[0]["bytes_read"]
        own = {
            "kernel": name,
            "seconds_median": step,
            "tokens_per_second": 1 / step,
            "first_token_seconds": statistics.median(statistics.median(result["first_token"]) for result in found),
            "peak_bytes": statistics.median(result["peak_bytes"] for result in found),
            "gigabytes_per_second": read / step / 1e9,
            "bandwidth_share": read / step / bandwidth,
        }
        for baseline, others in turns.items():
            if baseline in (name, *_OURS) or any("skipped" in result for result in others):
                continue
            other = [statistics.median(result["step"]) for result in others]
            ratio = {"baseline": baseline, "baseline_seconds_median": statistics.median(other), **ratios(other, steps)}
            rows.append({**base, **own, **ratio, **facts})
    return rows


def _bits(given: argparse.Namespace) -> float | None:
    if given.compressed:
        return json.loads((Path(given.compressed) / "config.json").read_text())["quantization_config"]["bits"]
    return given.bits if given.shape else None


def _summary(result: dict[str, Any]) -> str:
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    return f"{1 / statistics.median(result['step']):.1f} tokens/s, peak {result['peak_bytes'] / 1e6:.0f} MB"


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m hf_hyper.bench.generate", description="Speed of whole models.")
    parser.add_argument("--model", help="uncompressed model folder")
    parser.add_argument("--compressed", help="the same model, compressed")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a random model of this shape instead")
    parser.add_argument("--bits", type=float, default=4, help="bits per weight of a random model")
    parser.add_argument("--gguf", nargs="*", default=[], help="NAME=FILE, such as Q4_K_M=model.gguf")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=48, help="steps that are timed")
    parser.add_argument("--repeats", type=int, default=3, help="repeats in a process")
    parser.add_argument("--turns", type=int, default=3, help="processes of every contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every contender")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="static cache and a compiled forward pass")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if bool(given.model) == bool(given.shape):
        parser.error("give either --model or --shape")
    if given.worker:
        _work(given)
        return 0
    rows = compare(given)
    for row in rows:
        if row["baseline"] is None:
            print(f"{row['kernel']:<18} skipped: {row['skipped']}")
            continue
        print(
            f"{row['shape']:<12} {row['kernel']:<18} {row['tokens_per_second']:7.2f} tokens/s, first token "
            f"{row['first_token_seconds']:.3f} s, peak {row['peak_bytes'] / 1e6:6.0f} MB, "
            f"{row['gigabytes_per_second']:5.1f} GB/s ({row['bandwidth_share']:4.0%})  {row['baseline']:<18} "
            f"x{row['ratio_median']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
        )
    if given.json:
        write_json(given.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
