"""Tensors side by side: many small weights keep all processors busy, one large one is split by its encoder.

Small layers are too short to share among threads: most of their time goes into steps that one thread takes. So each
worker compresses whole tensors, alone, largest first, and the outcome of a tensor does not depend on who took it.
"""

import concurrent.futures
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

__all__ = ["side_by_side"]

T = TypeVar("T")


def side_by_side(sizes: Mapping[str, int], work: Callable[[str], T], workers: int | None = None) -> Iterator[T]:
    """`work(name)` for every name, as they are done: in the order of nothing.

    Tensors that hold more than a worker's share of all weights come first, one at a time, with all threads of torch;
    the others are dealt to workers that have one thread each.

    Args:
        sizes: Weights by name.
        work: What to do with a name; called without gradients. It holds the interpreter's lock for short times only.
        workers: At most so many at a time; `torch.get_num_threads()` unless given. 1 uses no thread but the caller's.

    Yields:
        What `work` returns.
    """
    threads = torch.get_num_threads()
    workers = min(threads if workers is None else workers, len(sizes))
    alone = [name for name in sizes if workers < 2 or sizes[name] * workers > sum(sizes.values())]
    for name in alone:
        with torch.no_grad():
            yield work(name)
    shared = sorted(set(sizes) - set(alone), key=lambda name: (-sizes[name], name))
    if not shared:
        return

    def one(name: str) -> T:
        with torch.no_grad():  # the mode belongs to a thread
            return work(name)

    pool = concurrent.futures.ThreadPoolExecutor(workers, "hyper", torch.set_num_threads, (1,))
    try:
        for future in concurrent.futures.as_completed([pool.submit(one, name) for name in shared]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # new threads of the process take the last number set by any
