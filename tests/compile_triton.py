"""Compile every Triton kernel for an H100 without one, from the arguments of real launches.

    TRITON_INTERPRET=0 python tests/compile_triton.py

Prints a line of JSON for each kernel: its name, the case, registers and bytes of stack of a thread (spilled registers
among them), bytes of shared memory, and instructions in the longest loop per thread. Run by `test_triton_compiles.py`.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_hyper import codec
from hf_hyper._triton import experts, rotation, shift_encode, shift_matmul, shift_rows, winding, winding_experts
from hf_hyper.config import HyperConfig
from hf_hyper.kernels import cuda, cuda_experts, cuda_winding
from hf_hyper.scheme import TensorScheme

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KERNELS = {
    rotation: ("_rotate", "_unrotate", "_finish"),
    shift_rows: ("_rows", "_blocks"),
    shift_matmul: ("_product", "_decode"),
    shift_encode: ("_advance", "_trace"),
    winding: ("_product", "_decode"),
    experts: ("_product",),
    winding_experts: ("_product",),
}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


class Recorder:
    """Stands in for a kernel: a launch compiles it, specialised as the launch would be, and nothing runs."""

    def __init__(self, kernel: Any, report: Callable[[dict[str, Any]], None]) -> None:
        self.kernel, self.report = kernel, report

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """The launcher for a grid, which must not be empty."""
        assert all(size > 0 for size in grid)
        return self.compile

    def compile(self, *arguments: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
        """Compile for the arguments of a launch."""
        given = dict(zip(self.kernel.arg_names, arguments, strict=False))
        fixed, free = dict(constants), set(self.kernel.do_not_specialize or ())
        signature, aligned = {}, {}
        for place, name in enumerate(self.kernel.arg_names):
            value = given.get(name)
            if name in constants or (isinstance(value, int) and value == 1 and name not in free):
                signature[name] = "constexpr"
                fixed[name] = constants.get(name, value)
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
            else:
                whole = "i32" if isinstance(value, int) and value < 1 << 31 else "i64"
                signature[name] = whole if isinstance(value, int) else "fp32"
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and name not in free):
                aligned[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=fixed, attrs=aligned)
        compiled = triton.compile(source, target=TARGET, options={"num_warps": num_warps, "num_stages": num_stages})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage, code = _dump("-res-usage", cubin.name), _dump("-sass", cubin.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        self.report(
            {
                "kernel": f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}",
                "registers": int(found[1]),
                "stack": int(found[2]),
                "shared": compiled.metadata.shared,
                "loop": _longest_loop(code),
            }
        )


def _dump(what: str, file: str) -> str:
    finished = subprocess.run([CUOBJDUMP, what, file], capture_output=True, text=True, check=True)
    return finished.stdout + finished.stderr


def _longest_loop(code: str) -> int:
    """Instructions between a backward branch and its target."""
    longest = 0
    for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target:
            longest = max(longest, (int(place, 16) - int(target[1], 16)) // 16 + 1)
    return longest


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names of launches and what makes them: widths of Llama-3.1-8B, all rates, numbers of tokens that are special."""

    def product(rows: int, columns: int, bits: int, tokens: int, dtype: torch.dtype) -> None:
        scheme = TensorScheme("shift", bits, rows, columns)
        tensors = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in codec.tensor_specs(scheme).items()}
        cuda.matmul_shift(torch.zeros(tokens, columns).to(dtype), tensors, scheme)

    half, bfloat = torch.float16, torch.bfloat16
    for bits in range(1, 9):
        yield f"{bits} bits", lambda bits=bits: product(256, 4096, bits, 1, bfloat)
    yield "width 14336, 16 tokens", lambda: product(256, 14336, 4, 16, half)
    yield "width 11008", lambda: product(256, 11008, 4, 1, bfloat)
    yield "width 65536", lambda: product(256, 65536, 4, 1, bfloat)
    yield "float32, 8 tokens", lambda: product(96, 576, 4, 8, torch.float32)
    yield "64 tokens", lambda: product(256, 4096, 4, 64, bfloat)
    yield "128 tokens", lambda: product(256, 4096, 4, 128, bfloat)
    yield "129 tokens", lambda: product(256, 14336, 4, 129, half)
    yield "1024 tokens", lambda: product(256, 4096, 4, 1024, bfloat)
    yield "width 14336, 1024 tokens", lambda: product(256, 14336, 4, 1024, bfloat)
    vocabulary = TensorScheme("shift", 4, 128256, 4096)
    empty = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in codec.tensor_specs(vocabulary).items()}
    index = torch.zeros(4, dtype=torch.int64)
    yield "embedding", lambda: cuda.embedding_shift(index, empty, vocabulary, bfloat)
    for dtype in (bfloat, torch.float32):
        pairs = HyperConfig(bits=4, hyperfunction="winding").scheme(256, 4096)
        tensors = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in codec.tensor_specs(pairs).items()}
        for tokens in (1, 64, 65):
            x = torch.zeros(tokens, 4096, dtype=dtype)
            yield f"winding, {tokens} tokens", lambda x=x, t=tensors, s=pairs: cuda_winding.matmul_winding(x, t, s)
    pairs = HyperConfig(bits=4, hyperfunction="winding").scheme(768, 2048)
    several = {n: torch.empty(8, *s.shape, dtype=s.dtype) for n, s in codec.tensor_specs(pairs).items()}
    rows, to = torch.zeros(8, 2048, dtype=bfloat), torch.arange(8)
    yield "winding, experts", lambda: cuda_winding.matmul_experts_winding(rows, to, several, pairs)
    for bits, count in ((4, 8), (2, 8), (4, 1024)):
        bank = TensorScheme("shift", bits, 768, 2048)
        parts = {n: torch.empty(8, *s.shape, dtype=s.dtype) for n, s in codec.tensor_specs(bank).items()}
        x, ids = torch.zeros(count, 2048, dtype=bfloat), torch.arange(count) % 8
        yield (
            f"experts, {bits} bits, {count} rows",
            lambda x=x, i=ids, t=parts, s=bank: cuda_experts.matmul_shift(x, i, t, s),
        )
    targets, table = torch.zeros(2, 256, dtype=torch.int32), torch.zeros(65536, dtype=torch.int32)
    for bits in (1, 2, 4, 8):
        yield f"search, {bits} bits", lambda bits=bits: shift_encode.full_search(table, targets, bits, 32)


def main() -> None:
    """Compile all cases and print what came out."""
    case = ""
    for module, names in KERNELS.items():
        for name in names:
            recorder = Recorder(getattr(module, name), lambda row: print(json.dumps({"case": case, **row}), flush=True))
            setattr(module, name, recorder)
    shift_matmul.multiprocessors = winding.multiprocessors = experts.multiprocessors = lambda device: 132
    for case, launch in cases():  # noqa: B007
        launch()


if __name__ == "__main__":
    main()
