"""Layers whose weights are stored by hyperfunctions."""

from hf_hyper.nn.linear import HyperLinear

__all__ = ["HyperLinear"]
