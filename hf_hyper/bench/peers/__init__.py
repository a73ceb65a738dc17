"""Methods of others that `bench.quality` puts beside ours: one function each, and the table of them.

`pip install ".[peers]"` brings their packages, best into an environment of its own: they pin versions of much else. A
peer gets a `Task` and gives back every layer decoded, with the bits that it stores for it.

| peer | what it is | bits per weight | reads text |
|---|---|---|---|
| `rtn` | rounding to nearest, asymmetric, groups of 64, 16-bit scale and b-bit zero point | b + (16 + b) / 64 | no |
| `nf4`, `nf4-dq` | bitsandbytes, blocks of 64, scales in float32 or quantized again (`dq`) | 4.5, 4.13 | no |
| `hqq` | HQQ, groups of 64, asymmetric, float16 scales and zero points | b + 32 / 64 | no |
| `gptq` | GPTQModel, symmetric, groups of 64 | b + (16 + b) / 64 | yes |
| `autoround` | AutoRound, symmetric, groups of 64, its default of 200 steps a block | b + (16 + b) / 64 | yes |
| `autoround-light` | the same with its recipe of 50 steps | b + (16 + b) / 64 | yes |
| `gguf` | llama.cpp's recipes with an importance matrix | measured | yes |
| `gguf-wrap` | the same, with blocks that run over the ends of rows: see `llama_recipes` | measured | yes |
"""

from functools import partial

from hf_hyper.bench.peers.autoround import DEFAULT, LIGHT, autoround
from hf_hyper.bench.peers.base import GROUP_SIZE, Decoded, Peer, Task
from hf_hyper.bench.peers.gptq import gptq
from hf_hyper.bench.peers.llama_recipes import RECIPES, llama_recipe
from hf_hyper.bench.peers.uncalibrated import hqq, nf4, rtn

__all__ = ["PEERS", "Decoded", "Peer", "Task"]

_GROUPS = {"group_size": GROUP_SIZE}

PEERS = {
    "rtn": Peer(rtn, tuple("2345678"), options=_GROUPS),
    "nf4": Peer(nf4, ("4",), "bitsandbytes", ("bitsandbytes",), options=_GROUPS),
    "nf4-dq": Peer(partial(nf4, nested=True), ("4",), "bitsandbytes", ("bitsandbytes",), options=_GROUPS),
    "hqq": Peer(hqq, tuple("23458"), "hqq", ("hqq",), options=_GROUPS),
    "gptq": Peer(gptq, tuple("2348"), "gptqmodel", ("gptqmodel",), True, _GROUPS),
    "autoround": Peer(autoround, tuple("2348"), "auto_round", ("auto-round",), True, {**_GROUPS, **DEFAULT}),
    "autoround-light": Peer(
        partial(autoround, recipe=LIGHT), tuple("2348"), "auto_round", ("auto-round",), True, {**_GROUPS, **LIGHT}
    ),
    "gguf": Peer(llama_recipe, RECIPES, "llama_cpp", ("llama-cpp-python", "gguf"), True),
    "gguf-wrap": Peer(partial(llama_recipe, wrap=True), RECIPES, "llama_cpp", ("llama-cpp-python", "gguf"), True),
}
"""Peers by the name that `bench.quality --methods` takes."""
