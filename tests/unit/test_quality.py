"""The quality benchmark measures all methods alike, and measures nothing twice."""

import json

import pytest
import torch

from hf_hyper.bench import quality
from hf_hyper.bench.peers.base import Peer
from hf_hyper.bench.quality_report import format_table
from hf_hyper.errors import ConfigError


def test_quality_rows(stories, tmp_path, capsys):
    report = tmp_path / "rows.json"
    other, picture = tmp_path / "other.txt", tmp_path / "rows.png"
    other.write_text("Once upon a time there was a dog who liked to run in the park. " * 20)
    arguments = [
        "--model",
        str(stories),
        "--json",
        str(report),
        "--plot",
        str(picture),
        "--text",
        "bundled",
        str(other),
    ]
    arguments += ["--methods", "nf4", "nf4-dq", "hqq", "rtn", "--sequences", "2", "--seq-len", "64"]
    assert quality.main([*arguments, "--bits", "4", "3"]) == 0
    rows = json.loads(report.read_text())
    measured = [row for row in rows if "skipped" not in row]
    assert [row["text"] for row in measured] == ["bundled", "other.txt"] * (len(measured) // 2)
    methods = dict.fromkeys((row["method"], row["bits"]) for row in rows)
    assert list(methods) == [("nf4", 4), ("nf4-dq", 4), ("hqq", 4), ("hqq", 3), ("rtn", 4), ("rtn", 3)]
    for row in measured:
        assert row["bits"] < row["bits_per_weight"] < row["bits"] + 0.8
        assert row["tokens"] == 2 * 63
        assert 0 < row["kl_mean"] <= row["kl_p99"] <= row["kl_max"]
    assert measured[-1]["kl_mean"] > measured[-3]["kl_mean"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "rtn" in capsys.readouterr().out


def test_peer_that_is_not_installed(stories, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows = list(
        quality.compare(stories, {"dog": "Once upon a time there was a dog."}, methods=["nf4"], sequences=1, seq_len=8)
    )
    assert rows == [{"method": "nf4", "bits": 4, "skipped": "bitsandbytes is not installed"}]
    assert "skipped: bitsandbytes is not installed" in format_table(rows)


def test_peers_may_need_gradients(stories, monkeypatch):
    grown = []

    def by_gradient(task, variant):
        for name, linear in task.linears.items():
            linear(torch.ones(1, linear.in_features)).sum().backward()
            grown.append(linear.weight.grad.norm())
            linear.weight.grad = None
            yield name, linear.weight, 32 * linear.weight.numel()

    monkeypatch.setitem(quality.PEERS, "nf4", Peer(by_gradient, ("4",)))
    (row,) = quality.compare(stories, {"dog": "Once there was a dog."}, methods=["nf4"], sequences=1, seq_len=8)
    assert row["kl_max"] < 1e-6
    assert all(norm > 0 for norm in grown)


def test_rows_that_are_there_are_kept(stories, tmp_path, monkeypatch):
    report = tmp_path / "rows.json"
    arguments = ["--model", str(stories), "--json", str(report), "--sequences", "2", "--methods", "rtn"]
    assert quality.main([*arguments, "--seq-len", "64", "--bits", "4"]) == 0
    (first,) = json.loads(report.read_text())
    report.write_text(json.dumps([{**first, "commit": "earlier"}]))
    assert quality.main([*arguments, "--seq-len", "64", "--bits", "4", "3.5", "3", "--resume"]) == 0
    kept, added = json.loads(report.read_text())
    assert kept["commit"] == "earlier"
    assert (added["bits"], added["model_sha256"]) == (3, first["model_sha256"])
    assert quality.main([*arguments, "--seq-len", "32", "--bits", "4", "--resume"]) == 0
    assert [row["seq_len"] for row in json.loads(report.read_text())] == [64, 64, 32]
    assert quality.main([*arguments, "--seq-len", "64", "--bits", "4", "--resume", "--anew", "rtn"]) == 0
    assert [row["commit"] for row in json.loads(report.read_text())] == [first["commit"]]
    assert quality.main([*arguments, "--seq-len", "64", "--bits", "3"]) == 0
    assert [row["bits"] for row in json.loads(report.read_text())] == [3]


def test_calibrated_rows_name_the_windows(stories, tmp_path):
    report = tmp_path / "rows.json"
    arguments = ["--model", str(stories), "--json", str(report), "--sequences", "2", "--seq-len", "64", "--bits", "2.5"]
    arguments += ["--effort", "fast", "--methods", "ldlq", "shift", "--calibration-tokens"]
    assert quality.main([*arguments, "512"]) == 0
    calibrated, plain = json.loads(report.read_text())
    assert calibrated["calibration_tokens"] == 512
    assert len(calibrated["calibration_sha256"]) == 64
    assert not [field for field in plain if field.startswith("calibration")]
    assert calibrated["kl_mean"] < plain["kl_mean"]
    assert quality.main([*arguments, "1024", "--resume"]) == 0
    rows = json.loads(report.read_text())
    assert [(row["method"], row.get("calibration_tokens")) for row in rows] == [
        ("ldlq", 512),
        ("shift", None),
        ("ldlq", 1024),
    ]


def test_table_compares_at_equal_bits():
    def row(method, bits, kl):
        named = dict.fromkeys(["kl_p99", "kl_max", "top1", "ppl", "ref_ppl", "seconds", "bits_per_weight"], 1.0)
        return {"method": method, "bits": bits, "kl_mean": kl, "text": "dogs", **named}

    lines = format_table([row("shift", 4, 0.2), row("rtn", 4, 0.4), row("rtn", 3, 1.0)]).splitlines()
    assert "0.500" in lines[2]
    assert "0.500" not in lines[1] + lines[3]


def test_unknown_method(stories):
    with pytest.raises(ConfigError, match="method 'magic' is unknown; choose from shift"):
        list(quality.compare(stories, {"text": "text"}, methods=["magic"]))


def test_a_seed_is_a_question_of_its_own(stories, tmp_path):
    report = tmp_path / "rows.json"
    arguments = ["--model", str(stories), "--json", str(report), "--sequences", "2", "--seq-len", "64", "--resume"]
    arguments += ["--methods", "shift", "rtn", "--effort", "fast", "--bits", "3"]
    for seed in ("0", "1", "1"):
        assert quality.main([*arguments, "--seed", seed]) == 0
    rows = json.loads(report.read_text())
    assert [(row["method"], row.get("seed")) for row in rows] == [("shift", None), ("rtn", None), ("shift", 1)]
    assert rows[0]["kl_mean"] != rows[2]["kl_mean"]
