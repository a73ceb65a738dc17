from pathlib import Path

from hf_hyper.bench.readme import section

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")


def test_results_are_those_of_the_saved_json() -> None:
    assert section() in README


def test_first_shell_block_holds_the_two_commands() -> None:
    lines = README.split("```sh\n")[1].split("```")[0].splitlines()
    assert len(lines) == 2
    assert all("torch==2.13.0" in line for line in lines)
    assert lines[0].endswith("hf-hyper demo")
