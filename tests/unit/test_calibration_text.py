"""The text of the saved figures: composed of shares, and said so where it cannot be."""

from pathlib import Path

import pytest

from hf_hyper.bench import calibration_text

DATA = Path(__file__).parents[3] / "shared/data/calib"


@pytest.fixture
def shares(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_text, "SHARES", {"web.utf8": 3, "code.utf8": 2})
    (tmp_path / "web.utf8").write_text("äöüß", encoding="utf-8")
    (tmp_path / "code.utf8").write_text("x=1", encoding="utf-8")
    return tmp_path


def test_shares_are_beginnings_in_order(shares):
    target = shares / "calib.txt"
    assert calibration_text.main([str(shares), str(target)]) == 0
    assert target.read_text(encoding="utf-8") == "äöü\n\nx="


def test_short_and_missing_files_are_named(shares, capsys):
    (shares / "code.utf8").write_text("x", encoding="utf-8")
    assert calibration_text.main([str(shares), str(shares / "out")]) == 1
    assert "code.utf8 has 1 characters, wanted at least 2" in capsys.readouterr().err
    (shares / "code.utf8").unlink()
    assert calibration_text.main([str(shares), str(shares / "out")]) == 1
    assert "code.utf8" in capsys.readouterr().err
    assert not (shares / "out").exists()


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/calib")
def test_text_of_the_saved_figures():
    text = calibration_text.compose(DATA)
    assert len(text) == sum(calibration_text.SHARES.values()) + 2 * (len(calibration_text.SHARES) - 1)
