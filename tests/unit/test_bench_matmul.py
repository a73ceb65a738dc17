"""`bench.matmul`: what it times, by number of tokens and accuracy."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_hyper import _native
from hf_hyper.bench import matmul
from hf_hyper.kernels import cpu

pytestmark = pytest.mark.skipif(_native.load() is None, reason=f"no compiled core: {_native.unavailable_reason()}")


@pytest.fixture(autouse=True)
def restored_activations() -> Iterator[None]:
    before = cpu.activations()
    yield
    cpu.set_activations(before)


@pytest.mark.skipif(_native.load() is None or _native.dense_tokens() == 0, reason="no dot products of bfloat16 pairs")
def test_rows_name_way_and_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matmul, "CACHE_BYTES", 1 << 16)
    monkeypatch.setattr(matmul, "read_bandwidth", lambda *args, **options: 1e9)
    monkeypatch.setattr(matmul, "_rivals", lambda *args: {})
    out = tmp_path / "out.json"
    arguments = ["--shapes", "16x512", "--bits", "4", "8", "--m", "1", "5", "--turns", "1", "--json", str(out)]
    assert matmul.main(arguments) == 0
    rows = [row for row in json.loads(out.read_text()) if row["baseline"] == "F.linear bfloat16"]
    found = {(row["bits"], row["M"], row["kernel"]) for row in rows if "shift" in row["kernel"]}
    isa = _native.matmul_isa()
    assert found == {
        *((bits, 1, f"cpu.matmul_shift fused {isa} {accuracy}") for bits in (4, 8) for accuracy in ("exact", "int8")),
        *((4, 5, f"cpu.matmul_shift dense {isa} {accuracy}") for accuracy in ("exact", "int8")),
        (8, 5, f"cpu.matmul_shift dense {isa} exact"),
    }
    assert all(row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"] for row in rows)
    assert "16" in capsys.readouterr().out
