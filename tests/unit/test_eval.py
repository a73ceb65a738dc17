"""Text sources, windows, perplexity and divergence, on the trained stories260K model."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hyper.errors import ConfigError
from hf_hyper.eval import evaluate_model, load_text, noise_floor, token_divergence, windows

ROOT = Path(__file__).parents[2]
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2-raw" / "wiki.valid.raw"


@pytest.fixture(scope="module")
def tokenizer(stories):
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="module")
def model(stories):
    return AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)


@pytest.fixture
def damaged(stories):
    """The model with noise of 5 % on every tensor."""
    other = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


def test_bundled_text_is_the_documented_file():
    text = load_text()
    assert text == load_text("bundled")
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "d9f72a348f5862c1db4b637c533719249df0ed30641d634993dfcabfcbca27db"


def test_rows_are_joined_by_a_blank_line():
    assert load_text(["one", "two"]) == "one\n\ntwo"


def test_dataset_gives_its_text_column():
    datasets = pytest.importorskip("datasets")
    assert load_text(datasets.Dataset.from_dict({"label": [0, 1], "text": ["one", "two"]})) == "one\n\ntwo"
    assert load_text(datasets.Dataset.from_dict({"story": ["one"]})) == "one"
    with pytest.raises(ConfigError, match=r"columns \['a', 'b'\] and none is called 'text'"):
        load_text(datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}))


def test_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "story.txt"
    path.write_bytes("Once.\n\n é".encode())
    assert load_text(path) == load_text(str(path)) == "Once.\n\n é"


def test_wikitext_file_becomes_the_stream_of_the_data_set(tmp_path):
    path = tmp_path / "wiki.valid.raw"
    path.write_bytes(b" \n = Title = \n \n Words . \n")
    assert load_text(path) == "\n\n".join(["", " = Title = \n", "", " Words . \n"])


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="WikiText-2 validation is not beside the repository")
def test_wikitext_validation_has_its_known_rows():
    raw = WIKITEXT.read_text(encoding="utf-8")
    rows = [line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1]]
    assert len(rows) == 3760
    assert load_text(WIKITEXT) == "\n\n".join(rows)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["", " \n"], "given as a list is empty"),
        (["one", 2], "row 1 of the text is a int"),
    ],
    ids=["blank", "not-a-string"],
)
def test_unusable_rows(source, message):
    with pytest.raises(ConfigError, match=message):
        load_text(source)


def test_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8"):
        load_text(path)


def test_name_that_is_nothing(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError, match=r"'no-such.txt' is neither a file nor a data set .*no such data set"):
        load_text("no-such.txt")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wikitext-2", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("owner/name", ("owner/name", None, "test")),
        ("owner/name:config", ("owner/name", "config", "test")),
        ("owner/name::train", ("owner/name", None, "train")),
    ],
)
def test_data_set_names(monkeypatch, name, expected):
    datasets = pytest.importorskip("datasets")
    asked = []

    def record(repository, config, split):
        asked.append((repository, config, split))
        return datasets.Dataset.from_dict({"text": ["words"]})

    monkeypatch.setattr(datasets, "load_dataset", record)
    assert load_text(name) == "words"
    assert asked == [expected]


def test_windows_do_not_overlap(tokenizer):
    text = load_text()[:3000]
    ids = tokenizer(text)["input_ids"]
    cut = windows(tokenizer, text, 128)
    assert cut.dtype == torch.int64
    assert cut.shape == (len(ids) // 128, 128)
    assert cut.flatten().tolist() == ids[: cut.numel()]
    assert torch.equal(windows(tokenizer, text, 128, sequences=2), cut[:2])


def test_windows_of_a_short_text(tokenizer):
    with pytest.raises(ConfigError, match=r"too short: its \d+ tokens make 0 windows of 128, 1 wanted"):
        windows(tokenizer, "Once upon a time.", 128)
    with pytest.raises(ConfigError, match=r"make \d windows of 128, 50 wanted"):
        windows(tokenizer, load_text()[:1000], 128, sequences=50)


@pytest.mark.parametrize(("seq_len", "sequences"), [(1, None), (16, 0)])
def test_windows_out_of_range(tokenizer, seq_len, sequences):
    with pytest.raises(ConfigError, match=r"seq_len is 1|sequences is 0"):
        windows(tokenizer, "text", seq_len, sequences)


def test_perplexity_is_the_models_own_loss(model, tokenizer):
    cut = windows(tokenizer, load_text(), 64, sequences=3)
    result = evaluate_model(model, cut)
    with torch.no_grad():
        loss = float(model(input_ids=cut, labels=cut).loss)
    # Both are float32 means of the same numbers, summed in another order.
    assert result.nll == pytest.approx(loss, rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(loss), rel=1e-5)
    assert (result.tokens, result.seq_len) == (3 * 63, 64)
    assert result.kl_mean is None
    assert set(result.to_dict()) == {"ppl", "nll", "tokens", "seq_len"}


def test_model_is_at_no_distance_from_itself(model, tokenizer):
    cut = windows(tokenizer, load_text(), 64, sequences=2)
    result = evaluate_model(model, cut, model)
    assert (result.kl_mean, result.kl_p99, result.kl_max, result.top1) == (0.0, 0.0, 0.0, 1.0)
    assert result.ref_ppl == result.ppl


def test_divergence_equals_the_definition(model, damaged, tokenizer):
    cut = windows(tokenizer, load_text(), 64, sequences=4)
    result = evaluate_model(damaged, cut, model, batch_size=3)
    with torch.no_grad():
        p, q = (each(input_ids=cut).logits[:, :-1].double().log_softmax(-1) for each in (model, damaged))
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    assert result.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert result.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    assert result.kl_max == pytest.approx(float(kl.max()), rel=1e-3)
    assert result.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert result.ref_ppl == pytest.approx(evaluate_model(model, cut).ppl)
    assert json.loads(json.dumps(dict(result.to_dict())))["kl_mean"] == result.kl_mean


def test_batch_size_does_not_matter(model, damaged, tokenizer):
    cut = windows(tokenizer, load_text(), 32, sequences=5)
    one, four = (evaluate_model(damaged, cut, model, batch_size=size) for size in (1, 4))
    assert one.kl_mean == pytest.approx(four.kl_mean, rel=1e-4)
    assert one.nll == pytest.approx(four.nll, rel=1e-5)


def test_divergence_in_chunks(monkeypatch):
    logits, reference = torch.randn(2, 50, 11).unbind()
    whole, agree = token_divergence(reference, logits)
    monkeypatch.setattr("hf_hyper.eval.kl.CHUNK_ELEMENTS", 77)
    parts, parts_agree = token_divergence(reference, logits)
    torch.testing.assert_close(parts, whole)
    assert torch.equal(parts_agree, agree)
    assert whole.shape == agree.shape == (50,)
    assert bool((whole > -1e-6).all())


def test_training_mode_is_restored(model, tokenizer):
    cut = windows(tokenizer, load_text(), 16, sequences=1)
    model.train()
    evaluate_model(model, cut)
    assert model.training
    model.eval()


def test_noise_floor_is_small(model, tokenizer):
    cut = windows(tokenizer, load_text(), 64, sequences=2)
    floor = noise_floor(model, cut).kl_mean
    assert floor is not None
    # bfloat16 keeps 8 bits: relative errors of 2^-9 in logits of order 10 give divergences of order 1e-4.
    assert 0 < floor < 5e-3
    assert model.dtype == torch.float32


def test_windows_that_do_not_fit_the_model(model):
    with pytest.raises(ConfigError, match="seq_len is 513 and the context of the model is 512"):
        evaluate_model(model, torch.zeros(1, 513, dtype=torch.int64))
    with pytest.raises(ConfigError, match="token id 512 is beyond the 512 rows"):
        evaluate_model(model, torch.full((1, 8), 512))
    with pytest.raises(ConfigError, match=r"shape \[8\]"):
        evaluate_model(model, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        evaluate_model(model, torch.zeros(1, 8, dtype=torch.int64), batch_size=0)


def test_metric_of_the_evaluate_library(model, damaged, tokenizer, tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate")
    folder = ROOT / "hf_hyper" / "eval" / "metrics" / "hyper_fidelity"
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", tmp_path / "modules")
    measurement = evaluate.load(str(folder), cache_dir=str(tmp_path / "cache"))
    rows = load_text()[:4000].split("\n\n")
    options = {"model": damaged, "reference": model, "tokenizer": tokenizer, "seq_len": 64}
    expected = evaluate_model(damaged, windows(tokenizer, "\n\n".join(rows), 64), model)
    assert measurement.compute(data=rows, **options) == expected.to_dict()
