"""Layers whose weights are stored by hyperfunctions."""

from hf_hyper.nn.embedding import HyperEmbedding
from hf_hyper.nn.experts import HyperExpertBank
from hf_hyper.nn.linear import HyperLinear
from hf_hyper.nn.stored import HyperLayer

__all__ = ["HyperEmbedding", "HyperExpertBank", "HyperLayer", "HyperLinear"]
