"""Searching the orbits: weights in, the tensors of a hyperfunction out."""

from hf_hyper.encoders.base import EFFORTS, encode

__all__ = ["EFFORTS", "encode"]
