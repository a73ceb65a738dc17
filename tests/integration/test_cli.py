"""The command line as users run it: in a process of its own, judged by exit code, output and files."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fakehub import FakeHub
from safetensors.torch import load_file, save_file

from hf_hyper.cli import main

COMPRESS = ("compress", "--bits", "2", "--effort", "fast")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hf_hyper.cli", *map(str, arguments)]


def hf_hyper(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command and check its exit code."""
    finished = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert finished.returncode == code, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished


def stored(folder: Path) -> tuple[dict, bytes]:
    """Header and data of the weight file; the writer puts entries of the header's metadata in any order."""
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at 2 bits, made by the command."""
    folder = tmp_path_factory.mktemp("compressed") / "stories"
    source = Path(__file__).parents[1] / "data" / "stories260K"
    finished = hf_hyper(*COMPRESS, source, folder)
    assert finished.stdout.startswith(f"{folder}: 35 tensors at 2.460 bits per weight")
    assert finished.stderr == ""
    return folder


def test_info_lists_every_tensor(compressed: Path, tmp_path: Path):
    finished = hf_hyper("info", compressed, "--json", tmp_path / "deep" / "info.json")
    assert "model.layers.4.mlp.down_proj        64 x 172" in finished.stdout
    assert "2.460 bits per weight with all overheads" in finished.stdout
    totals = json.loads((tmp_path / "deep" / "info.json").read_text())["totals"]
    assert totals["compressed_weights"] + totals["uncompressed_weights"] == 260_032
    assert 0 < totals["relative_error"] < 0.2


def test_info_needs_neither_weights_nor_report(compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "headers"
    shutil.copytree(compressed, folder)
    (folder / "hyper_report.json").unlink()
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    assert main(["info", str(folder)]) == 0
    assert "2.460 bits per weight with all overheads" in capsys.readouterr().out


def test_info_plots(compressed: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert main(["info", str(compressed), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_info_says_how_to_get_plots(compressed: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["info", str(compressed), "--plot", "never.png"]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_eval_measures_and_compares(compressed: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    options = ["--reference", str(stories), "--seq-len", "128", "--sequences", "2"]
    assert main(["eval", str(compressed), *options, "--json", str(tmp_path / "eval.json")]) == 0
    assert "perplexity" in capsys.readouterr().out
    values = json.loads((tmp_path / "eval.json").read_text())
    assert values["tokens"] == 2 * 127
    assert values["seq_len"] == 128
    assert values["size_bytes"] == (compressed / "model.safetensors").stat().st_size
    assert values["bits_per_weight"] == pytest.approx(2.460, abs=0.001)
    assert 0 < values["kl_mean"] < values["kl_p99"] <= values["kl_max"]
    assert 0 < values["top1"] < 1
    assert values["ppl"] > values["ref_ppl"]


def test_eval_shortens_windows_to_the_context(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["eval", str(stories), "--sequences", "1", "--json", str(tmp_path / "eval.json")]) == 0
    assert "windows of 512 tokens, the model's context, instead of 2048" in capsys.readouterr().err
    values = json.loads((tmp_path / "eval.json").read_text())
    assert values["seq_len"] == 512
    assert values["bits_per_weight"] is None


def test_eval_reads_a_text_file(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "text.txt").write_text("Once upon a time there was a little girl. " * 40)
    assert main(["eval", str(stories), "--text", str(tmp_path / "text.txt"), "--seq-len", "64"]) == 0
    assert "windows of 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["melt"], "invalid choice: 'melt'"),
        (["compress", "a"], "required: DST"),
        (["compress", "a", "b", "--bits", "9"], "bits is 9.0, wanted a number from 1 to 8"),
        (["compress", "a", "b", "--hyperfunction", "sine"], "'sine' does not exist; choose one of"),
        (["compress", "a", "b", "--effort", "heroic"], "wanted one of 'fast', 'balanced', 'best'"),
        (["compress", "a", "b", "--allocation", "loss"], "allocation 'loss' needs calibration"),
        (["compress", "a", "b", "--bits", "auto"], "got bits 'auto' without max_kl"),
        (["compress", "a", "b", "--bits", "few"], "argument --bits: 'few' is neither a number nor 'auto'"),
        (["compress", "a", "b", "--seed", "-1"], "seed is -1"),
        (["eval", "a", "--seq-len", "1"], "--seq-len is 1, wanted 2 or more"),
        (["eval", "a", "--text", "missing.txt"], "--text missing.txt is not a file"),
        (["demo", "--bits", "0"], "bits is 0.0, wanted a number from 1 to 8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_missing_source_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([*COMPRESS, str(tmp_path / "missing"), str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert "is neither a folder nor a .gguf file nor a Hub id; check the path" in errors
    assert errors.count("\n") == 1


def test_existing_destination_exits_with_1(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").touch()
    assert main([*COMPRESS, str(stories), str(tmp_path)]) == 1
    assert "already exists; give a new name or remove it first" in capsys.readouterr().err


def test_bad_weight_is_named_in_one_paragraph(stories: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(stories, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 7] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    finished = hf_hyper(*COMPRESS, source, tmp_path / "out", code=1)
    assert finished.stderr.startswith(
        "hf-hyper: model.layers.1.self_attn.o_proj: inf at row 0, column 7, wanted finite"
    )
    assert finished.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["info", str(tmp_path), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["**/*.safetensors", ".out.partial-*", ".out.partial-*/*.safetensors"])
def test_killed_run_leaves_no_destination_and_resumes(moment: str, compressed: Path, stories: Path, tmp_path: Path):
    run = command(*COMPRESS, "--resume", stories, tmp_path / "out")
    with subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(tmp_path.glob(moment)):
            time.sleep(0.001)
        process.kill()
    # The last moments are short: a run that got past them has a complete folder.
    assert process.returncode == 0 or not (tmp_path / "out").exists()
    if process.returncode:
        hf_hyper(*COMPRESS, "--resume", stories, tmp_path / "out")
    assert stored(tmp_path / "out") == stored(compressed)
    assert not (tmp_path / ".out.resume").exists()


@pytest.mark.slow
def test_interrupt_exits_with_130(stories: Path, tmp_path: Path):
    run = command("compress", "--effort", "best", "--resume", stories, tmp_path / "out")
    # Children of a shell's background job are born deaf to interrupts.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening
    ) as process:
        while process.poll() is None and not any(tmp_path.glob("**/*.safetensors")):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors == "hf-hyper: interrupted\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pushed_model_loads_from_the_hub(stories: Path, tmp_path: Path):
    script = f"""
import sys, torch
from hf_hyper.cli import main
assert main({[*COMPRESS, "--push-to-hub", "user/stories", str(stories), str(tmp_path / "out")]}) == 0
assert main(["info", "user/stories"]) == 0
from transformers import AutoModelForCausalLM
names = ({str(tmp_path / "out")!r}, "user/stories")
here, there = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in names)
assert here.keys() == there.keys()
assert all(torch.equal(here[name], there[name]) for name in here)
"""
    with FakeHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        finished = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stderr
        repository = hub.repositories["user/stories"]
    assert "2.460 bits per weight with all overheads" in finished.stdout
    assert len(repository.commits) == 2  # the empty repository and one upload
    assert set(repository.files) >= {"config.json", "hyper_report.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.slow
def test_unknown_repository_is_one_paragraph(tmp_path: Path):
    with FakeHub() as hub:
        finished = subprocess.run(
            command(*COMPRESS, "user/missing", tmp_path / "out"),
            env={**os.environ, **hub.environment(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert finished.returncode == 1
    assert finished.stderr.startswith("hf-hyper: model 'user/missing' cannot be read; check the name")
    assert finished.stderr.count("\n") == 1
