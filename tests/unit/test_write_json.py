"""`pipeline.report.write_json`."""

import json
from pathlib import Path

import pytest

from hf_hyper.pipeline.report import write_json


@pytest.mark.parametrize("values", [[], [{"a": 1.5, "b": [None, "ä"]}, {"a": 2}], {"a": {"b": [1, 2]}}])
def test_written_json_reads_back_and_leaves_no_other_file(values: object, tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "out.json", values)
    assert json.loads((tmp_path / "new" / "out.json").read_text(encoding="utf-8")) == values
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]


def test_rows_are_one_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "out.json", [{"a": 1}, {"a": 2}])
    assert (tmp_path / "out.json").read_text() == '[\n{"a": 1},\n{"a": 2}\n]\n'
