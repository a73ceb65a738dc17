"""One measurement of `bench.generate` through llama-cpp-python, in whichever interpreter has it.

    python llama_cpp_worker.py FILE TOKENS REPEATS THREADS PROMPT

Run by path, because that interpreter need not have torch. Prints one line of JSON with the keys of `generate.measure`.
"""

import importlib
import json
import resource
import sys
import time
from pathlib import Path


def main(file: str, tokens: int, repeats: int, threads: int, prompt: int) -> None:
    """Measure one GGUF file; arguments as in the module."""
    llama_cpp = importlib.import_module("llama_cpp")
    model = llama_cpp.Llama(file, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = list(range(100, 100 + prompt))

    def seconds(count: int) -> float:
        started = time.perf_counter()
        model.reset()
        for made, _ in enumerate(model.generate(ids, temp=0.0, reset=False), start=1):
            if made == count:
                return time.perf_counter() - started
        raise RuntimeError(f"{file}: generation ended before {count} tokens")

    seconds(2)
    first, step = [], []
    for _ in range(repeats):
        first.append(seconds(1))
        step.append((seconds(1 + tokens) - first[-1]) / tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"first_token": first, "step": step, "bytes_read": Path(file).stat().st_size, "peak_bytes": peak}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
