"""Convert karpathy's stories260K (llama2.c form) into a transformers folder for the tests.

The model is a trained Llama of 260,032 float32 parameters with awkward sizes: hidden 64, feed-forward 172, 5 layers,
8 heads of 8 with 4 key/value heads, vocabulary 512, context 512, tied embeddings. The folder `stories260K` beside this
file is what the script wrote; it is kept in the repository so that the tests need neither network nor conversion.

    python tests/data/convert_stories260k.py SOURCE tests/data/stories260K

The source is karpathy/tinyllamas (MIT), as carried by forks of llama2.c. `SOURCE` holds two files, named with their
sha256; the `sentencepiece` package is needed here, not to use the result.

    stories260K.bin  b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696
    tok512.model     fec6aa960a1fb3ebf71d26f9b0e486afcbd76c34cf0fbfb93e21126ca9f778d3

Layout of the `.bin`, little endian: seven int32 `dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len`
(a positive vocab_size means that the classifier is tied to the embedding), then float32 row-major arrays, each for
all layers at once, in the order of `read_weights`; the rotary tables at the end are recomputed by transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

_HEADER_INTS = 7


def read_config(header: np.ndarray) -> LlamaConfig:
    """The configuration that the seven integers of the header describe."""
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = (int(value) for value in header)
    return LlamaConfig(
        vocab_size=abs(vocab_size),
        hidden_size=dim,
        intermediate_size=hidden_dim,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=seq_len,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=vocab_size > 0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows `[heads * head_dim, dim]` of q or k, from interleaved rotary pairs to the two halves of transformers."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def read_weights(values: Tensor, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every parameter, from the float32 part of the file."""
    dim, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    kv_dim = dim // heads * kv_heads
    start = 0

    def take(*shape: int) -> Tensor:
        nonlocal start
        count = int(np.prod(shape))
        start += count
        return values[start - count : start].view(*shape)

    yield "model.embed_tokens.weight", take(config.vocab_size, dim)
    for name, shape in (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_dim, dim)),
        ("self_attn.v_proj", (kv_dim, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ):
        for layer, weight in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                weight = halves_from_pairs(weight, heads if name.endswith("q_proj") else kv_heads)
            yield f"model.layers.{layer}.{name}.weight", weight
    yield "model.norm.weight", take(dim)


def read_tokenizer(path: Path) -> LlamaTokenizer:
    """The SentencePiece model as vocabulary and merges: every split of a piece into two pieces, best score first."""
    pieces = SentencePieceProcessor(model_file=str(path))
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    merges: list[tuple[str, str]] = []
    for piece, index in sorted(vocabulary.items(), key=lambda item: -pieces.get_score(item[1])):
        if pieces.is_control(index) or pieces.is_byte(index) or pieces.is_unknown(index):
            continue
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = (split for split in splits if split[0] in vocabulary and split[1] in vocabulary)
        merges += sorted(known, key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
    return LlamaTokenizer(vocab=vocabulary, merges=merges, model_max_length=512, add_bos_token=True)


def convert(source: Path, target: Path) -> None:
    """Read `source/stories260K.bin` and `source/tok512.model`, write a transformers folder to `target`."""
    raw = (source / "stories260K.bin").read_bytes()
    config = read_config(np.frombuffer(raw, "<i4", count=_HEADER_INTS))
    values = torch.from_numpy(np.frombuffer(raw, "<f4", offset=4 * _HEADER_INTS).copy())
    model = LlamaForCausalLM(config)
    weights = dict(read_weights(values, config))
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    model.save_pretrained(target)
    read_tokenizer(source / "tok512.model").save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    convert(arguments.source, arguments.target)
