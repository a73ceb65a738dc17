"""Texts that calibrate and texts that measure are disjoint halves, and every pair of them is measured."""

import json
from itertools import product

import pytest

from hf_hyper.bench import quality_domains

TEXTS = {
    "dogs.txt": "Once upon a time there was a dog who liked to run in the park.\n" * 120,
    "girls.txt": "One day a girl named Lily went to the shop with her mother to buy a red ball.\n" * 120,
}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("one\ntwo\nthree\n", ("one\ntwo\n", "three\n")),
        ("one line", ("one ", "line")),
        ("a long first line\nend", ("a long first line\n", "end")),
        ("a\na long last line", ("a\na long ", "last line")),
    ],
)
def test_halves(text, wanted):
    assert quality_domains.halves(text) == wanted


def test_every_pair_is_measured(stories, tmp_path):
    report = tmp_path / "rows.json"
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    arguments = ["--model", str(stories), "--json", str(report), "--sequences", "2", "--seq-len", "64", "--resume"]
    arguments += ["--methods", "ldlq", "--effort", "fast", "--calibration-tokens", "256", "--bits", "3", "--texts"]
    arguments += [str(tmp_path / name) for name in TEXTS]
    for _ in range(2):  # the second run measures nothing
        assert quality_domains.main(arguments) == 0
    rows = json.loads(report.read_text())
    pairs = [(f"{first}, first half", f"{second}, second half") for first, second in product(TEXTS, TEXTS)]
    assert [(row["calibration"], row["text"]) for row in rows] == pairs
    assert len({row["kl_mean"] for row in rows}) == 4
