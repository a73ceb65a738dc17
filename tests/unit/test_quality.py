"""The peers of the quality benchmark are what they claim to be, and all are measured alike."""

import json

import pytest
import torch

from hf_hyper.bench import quality
from hf_hyper.errors import ConfigError


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_on_its_own_grid_is_exact(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (4, 128), generator=generator)
    codes[:, ::64], codes[:, 1::64] = 0, 2**bits - 1
    weight = (codes - 2 ** (bits - 1)) * 0.125
    decoded, stored = quality.round_to_nearest(weight, bits)
    torch.testing.assert_close(decoded, weight, rtol=0, atol=0)
    assert stored == weight.numel() * bits + 8 * (16 + bits)


def test_round_to_nearest_errs_by_half_a_step():
    weight = torch.randn(8, 172, generator=torch.Generator().manual_seed(0))
    decoded, stored = quality.round_to_nearest(weight, 4)
    for start in range(0, 172, 64):
        part = weight[:, start : start + 64]
        step = (part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)) / 15
        error = (decoded[:, start : start + 64] - part).abs().amax(1)
        # A whole step: the zero point is rounded too, and may cut the end of the range by half a step.
        assert bool((error <= 1.02 * step).all())
    assert stored == 8 * (172 * 4 + 3 * 20)


def test_round_to_nearest_of_zeros():
    decoded, _ = quality.round_to_nearest(torch.zeros(2, 64), 4)
    assert not decoded.any()


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
    assert "skipped: bitsandbytes is not installed" in quality.format_table(rows)


def test_table_compares_at_equal_bits():
    def row(method, bits, kl):
        named = dict.fromkeys(["kl_p99", "kl_max", "top1", "ppl", "ref_ppl", "seconds", "bits_per_weight"], 1.0)
        return {"method": method, "bits": bits, "kl_mean": kl, "text": "dogs", **named}

    lines = quality.format_table([row("shift", 4, 0.2), row("rtn", 4, 0.4), row("rtn", 3, 1.0)]).splitlines()
    assert "0.500" in lines[2]
    assert "0.500" not in lines[1] + lines[3]


def test_unknown_method(stories):
    with pytest.raises(ConfigError, match="method 'magic' is unknown; choose from shift"):
        list(quality.compare(stories, {"text": "text"}, methods=["magic"]))
