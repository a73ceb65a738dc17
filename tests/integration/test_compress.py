"""`pipeline.compress`: a folder that is complete or absent, resumable, and faithful to its source."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_hyper
from hf_hyper import codec
from hf_hyper.errors import ConfigError, ShapeError
from hf_hyper.pipeline import compress as pipeline
from hf_hyper.pipeline.compress import compress
from hf_hyper.pipeline.report import summarize

FAST = {"bits": 2, "effort": "fast"}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at 2 bits."""
    folder = tmp_path_factory.mktemp("compressed") / "stories"
    compress(Path(__file__).parents[1] / "data" / "stories260K", folder, hf_hyper.HyperConfig(**FAST))
    return folder


def stored(folder: Path) -> tuple[dict, bytes]:
    """Header and data of the weight file; the writer puts entries of the header's metadata in any order."""
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_folder_is_what_from_pretrained_and_save_pretrained_make(compressed: Path, stories: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(stories, quantization_config=hf_hyper.HyperConfig(**FAST))
    model.save_pretrained(tmp_path)
    assert stored(compressed) == stored(tmp_path)


def test_folder_brings_its_tokenizer_and_generation_config(compressed: Path, stories: Path):
    assert (compressed / "tokenizer.json").read_bytes() == (stories / "tokenizer.json").read_bytes()
    text = "Once upon a time"
    wanted = AutoTokenizer.from_pretrained(stories)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(compressed)(text)["input_ids"] == wanted
    assert (compressed / "generation_config.json").is_file()


def test_nothing_is_left_beside_the_destination(compressed: Path):
    assert [path.name for path in compressed.parent.iterdir()] == [compressed.name]


def test_report_says_what_the_decoded_weights_say(compressed: Path, stories: Path):
    model = AutoModelForCausalLM.from_pretrained(compressed)
    original = load_file(stories / "model.safetensors")
    report = summarize(compressed)
    assert len(report.tensors) == 35
    for record in report.tensors:
        weight = original[f"{record.name}.weight"]
        assert record.shape == tuple(weight.shape)
        error = (model.get_submodule(record.name).weight - weight).square().sum() / weight.square().sum()
        assert record.relative_error == pytest.approx(float(error), rel=1e-4)  # float32 sums in another order
        assert record.seconds is not None


def test_report_counts_every_stored_byte(compressed: Path):
    report = summarize(compressed)
    model = AutoModelForCausalLM.from_pretrained(compressed)
    tensors = load_file(compressed / "model.safetensors")
    sentinel = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    assert sentinel.dtype == torch.uint8
    assert report.compressed_bytes + report.uncompressed_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert report.size_bytes == (compressed / "model.safetensors").stat().st_size
    in_memory = summarize(model)
    assert in_memory.bits_per_weight == report.bits_per_weight
    assert in_memory.uncompressed_bytes == report.uncompressed_bytes


def test_report_in_the_folder_names_no_path(compressed: Path):
    report = json.loads((compressed / "hyper_report.json").read_text())
    assert report["source"] == "stories260K"
    assert {"bits", "hyperfunction", "effort", "seed", "seconds", "versions", "totals", "tensors"} <= set(report)


def test_plain_model_has_no_compressed_tensors(stories: Path):
    report = summarize(stories)
    assert (report.tensors, report.bits_per_weight) == ([], None)
    assert report.uncompressed_weights == 260_032


def test_sharded_folder_reads_like_a_single_file(compressed: Path, tmp_path: Path):
    AutoModelForCausalLM.from_pretrained(compressed).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded, whole = summarize(tmp_path), summarize(compressed)
    assert sharded.compressed_bytes == whole.compressed_bytes
    assert sharded.uncompressed_bytes == whole.uncompressed_bytes


def test_existing_destination_is_refused_and_untouched(stories: Path, tmp_path: Path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match=r"already exists; give a new name"):
        compress(stories, tmp_path, hf_hyper.HyperConfig(**FAST))
    assert (tmp_path / "file").read_text() == "precious"


def test_empty_destination_is_used(stories: Path, compressed: Path, tmp_path: Path):
    compress(stories, tmp_path, hf_hyper.HyperConfig(**FAST))
    assert stored(tmp_path) == stored(compressed)


def test_compressed_source_is_refused(compressed: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"already quantized \(quant_method 'hyper'\)"):
        compress(compressed, tmp_path / "twice", hf_hyper.HyperConfig(**FAST))


def test_unknown_device_is_refused(stories: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"device 'abacus' cannot be used"):
        compress(stories, tmp_path / "out", hf_hyper.HyperConfig(**FAST), device="abacus")


def test_bad_weight_stops_the_run_at_once(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = damaged(stories, tmp_path / "source")
    seen: list[str] = []
    quantize = codec.quantize
    monkeypatch.setattr(codec, "quantize", lambda *args, name: seen.append(name) or quantize(*args, name=name))
    with pytest.raises(ShapeError, match=r"^model\.layers\.2\.mlp\.up_proj: nan at row 3, column 5"):
        compress(source, tmp_path / "out", hf_hyper.HyperConfig(**FAST))
    assert seen[-1] == "model.layers.2.mlp.up_proj"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_failed_save_leaves_nothing(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pipeline, "write_json", full)
    with pytest.raises(OSError, match="no space left"):
        compress(stories, tmp_path / "out", hf_hyper.HyperConfig(**FAST))
    assert not list(tmp_path.iterdir())


def test_resumed_run_encodes_only_what_is_missing(
    stories: Path, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = hf_hyper.HyperConfig(**FAST)
    with pytest.raises(ShapeError):
        compress(damaged(stories, tmp_path / "source"), tmp_path / "out", config, resume=True)
    kept = len(list((tmp_path / ".out.resume").glob("*.safetensors")))
    assert 0 < kept < 35
    seen: list[str] = []
    quantize = codec.quantize
    monkeypatch.setattr(codec, "quantize", lambda *args, name: seen.append(name) or quantize(*args, name=name))
    compress(stories, tmp_path / "out", hf_hyper.HyperConfig(**FAST), resume=True)
    assert len(seen) == 35 - kept
    assert stored(tmp_path / "out") == stored(compressed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def damaged(stories: Path, folder: Path) -> Path:
    """A copy of the model with a NaN in one weight."""
    shutil.copytree(stories, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
