"""Random models of `bench.generate`: what is compressed, and what a step reads."""

import pytest
import torch

from hf_hyper.bench import generate
from hf_hyper.nn.linear import HyperLinear

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}


def test_output_head_is_compressed_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generate.SHAPES, "tiny", TINY)
    plain, kept, whole = (
        generate.random_model("tiny", torch.bfloat16, bits, compress_head=head)
        for bits, head in ((None, False), (4, False), (4, True))
    )
    embedding = whole.get_input_embeddings().get_parameter("weight")
    assert kept.lm_head.weight is kept.get_input_embeddings().get_parameter("weight")
    assert isinstance(whole.get_output_embeddings(), HyperLinear)
    assert embedding.dtype == torch.bfloat16
    read = [generate.measure(model, tokens=2, repeats=1)["bytes_read"] for model in (plain, kept, whole)]
    assert read[0] > read[1] > read[2] > 0
    saved = read[1] - read[2]
    assert 0.7 * embedding.nbytes < saved < 0.75 * embedding.nbytes  # 16 bits a weight become 4 and scales
