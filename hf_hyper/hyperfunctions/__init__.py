"""The maps: each file is one hyperfunction, `base.py` the protocol and the table."""

from hf_hyper.hyperfunctions import shift, winding
from hf_hyper.hyperfunctions.base import Hyperfunction, TensorSpec, get, names, register

__all__ = ["Hyperfunction", "TensorSpec", "get", "names"]

register(shift.Shift())
register(winding.Winding())
