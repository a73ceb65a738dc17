"""Hyper-compression for transformers: weights stored as points on the orbit of an ergodic map.

Importing the package registers the quantization method `hyper`:

    import hf_hyper
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=hf_hyper.HyperConfig(bits=4))
    model.save_pretrained("compressed")
    model = AutoModelForCausalLM.from_pretrained("compressed")
"""

from importlib.metadata import version

from hf_hyper.config import HyperCompressionConfig, HyperConfig
from hf_hyper.errors import ConfigError, FormatError, HyperError, KernelUnavailable, ShapeError
from hf_hyper.hyperfunctions.winding import WindingOptions
from hf_hyper.nn.linear import HyperLinear
from hf_hyper.pipeline.module import compress_module, load_module
from hf_hyper.quantizer import compress_model, register

__all__ = [
    "ConfigError",
    "FormatError",
    "HyperCompressionConfig",
    "HyperConfig",
    "HyperError",
    "HyperLinear",
    "KernelUnavailable",
    "ShapeError",
    "WindingOptions",
    "__version__",
    "compress_model",
    "compress_module",
    "load_module",
]

__version__ = version("hf-hyper")

register()
