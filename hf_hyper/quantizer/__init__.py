"""transformers' view of the package: a quantizer called `hyper`. No numerics here.

choice.py        which weights of a model are compressed, and how
on_load.py       the loader's operation that turns one weight into stored tensors
recorded.py      layers of a compressed folder
sentinel.py      the tensor without which other loaders would go on with random weights
hf_quantizer.py  the hooks that transformers calls, made of these
in_memory.py     the same for a model that is loaded already
"""

from hf_hyper.quantizer.hf_quantizer import HyperHfQuantizer, register
from hf_hyper.quantizer.in_memory import compress_model
from hf_hyper.quantizer.on_load import HyperQuantize

__all__ = ["HyperHfQuantizer", "HyperQuantize", "compress_model", "register"]
