"""From a model that a user names to a complete compressed folder: the function behind `hf-hyper compress`.

Loading compresses; this module adds what makes it safe to run for hours. The destination appears in one rename, so a
folder under its final name is complete; finished tensors can be kept across runs; an unusable weight stops the run at
once instead of after the last tensor; everything that can fail early (destination, device, repository) is tried first.
"""

import contextlib
import importlib.metadata
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import PreTrainedModel

from hf_hyper.config import HyperConfig
from hf_hyper.errors import ConfigError
from hf_hyper.pipeline.gguf import load_gguf
from hf_hyper.pipeline.report import REPORT_NAME, Report, summarize, write_json
from hf_hyper.pipeline.source import is_gguf, model_class, read_config
from hf_hyper.storage.resume import TensorStore

__all__ = ["compress", "pick_device"]

_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "additional_chat_templates/*",
    "*preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files of a checkpoint that are copied as they are: what tokenizers and processors read, and the terms of use."""


def compress(
    source: str | Path,
    destination: str | Path,
    config: HyperConfig,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
    resume: bool = False,
    push_to_hub: str | None = None,
) -> Report:
    """Compress a model into a folder that `from_pretrained` loads.

    Args:
        source: Hub id, local folder or `.gguf` file.
        destination: Folder to make; it may exist only if it is empty.
        config: How to compress.
        device: Where to search: `"auto"` takes CUDA if there is any, else the CPU.
        dtype: Of the tensors that stay uncompressed; `"auto"` keeps the checkpoint's, and takes bfloat16 for `.gguf`.
        resume: Keep finished tensors beside the destination until the run succeeds, and use those of an earlier run.
        push_to_hub: Repository to upload the folder to, made when needed.

    Returns:
        Size, rate and error of every tensor, as also written to `hyper_report.json`.

    Raises:
        ConfigError: An argument cannot be used, or the source is already compressed.
        ShapeError: A weight cannot be compressed.
    """
    destination = Path(destination)
    _check_destination(destination)
    device = pick_device(device)
    if not is_gguf(source):
        _check_source(source)
    repository = None if push_to_hub is None else str(HfApi().create_repo(push_to_hub, exist_ok=True).repo_id)
    started = time.perf_counter()
    with _as_folder(source, destination) as folder:
        if is_gguf(source) and dtype == "auto":
            dtype = torch.bfloat16
        kept = destination.with_name(f".{destination.name}.resume") if resume else None
        model = _load(folder, config, device, dtype, TensorStore(kept))
        report = _save(model, folder, destination, _about(source, model, started))
    if kept is not None:
        shutil.rmtree(kept)
    if repository is not None:
        HfApi().upload_folder(
            repo_id=repository, folder_path=destination, commit_message="Upload model compressed with hf-hyper"
        )
    return report


def pick_device(device: str | torch.device) -> torch.device:
    """The device meant by a name; `"auto"` is CUDA where there is any, else the CPU.

    Raises:
        ConfigError: There is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        message = f"device {str(device)!r} cannot be used ({reason}); choose 'auto', 'cpu' or 'cuda'"
        raise ConfigError(message) from error
    return torch.device(device)


def _check_destination(destination: Path) -> None:
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ConfigError(f"destination {destination} already exists; give a new name or remove it first")
    destination.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(destination.parent, os.W_OK):
        raise ConfigError(f"folder {destination.parent} cannot be written; choose another destination")


@contextlib.contextmanager
def _as_folder(source: str | Path, destination: Path) -> Iterator[str | Path]:
    """The source as something that `from_pretrained` takes; a GGUF file becomes a temporary folder."""
    if not is_gguf(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.gguf-", dir=destination.parent) as name:
        model, tokenizer = load_gguf(source)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        del model
        yield Path(name)


def _check_source(source: str | Path) -> None:
    existing = getattr(read_config(source), "quantization_config", None)
    if existing is not None:
        method = existing.get("quant_method", "unknown") if isinstance(existing, dict) else existing.quant_method
        raise ConfigError(
            f"model {str(source)!r} is already quantized (quant_method {str(method)!r}), wanted plain weights; start "
            "from the model it was made from, or save a dequantized copy first"
        )


def _load(
    source: str | Path, config: HyperConfig, device: torch.device, dtype: torch.dtype | str, store: TensorStore
) -> PreTrainedModel:
    options = {} if device.type == "cpu" else {"device_map": {"": device}}
    with store.use():
        return model_class(read_config(source)).from_pretrained(
            source, quantization_config=config, dtype=dtype, **options
        )


def _about(source: str | Path, model: PreTrainedModel, started: float) -> dict[str, object]:
    config = model.config.quantization_config
    return {
        "source": Path(source).name if Path(source).exists() else str(source),
        "bits": config.bits,
        "hyperfunction": config.hyperfunction,
        "effort": config.effort,
        "seed": config.seed,
        **model.hf_quantizer.calibrated,  # pyright: ignore
        "seconds": time.perf_counter() - started,
        "versions": {name: importlib.metadata.version(name) for name in ("hf-hyper", "transformers", "torch")},
    }


def _save(model: PreTrainedModel, source: str | Path, destination: Path, about: dict[str, object]) -> Report:
    """Write a sibling of the destination, then rename it."""
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        model.save_pretrained(partial)
        _copy_companions(source, partial)
        report = summarize(partial, model.hf_quantizer.measured)  # pyright: ignore
        write_json(partial / REPORT_NAME, {**about, **report.to_dict()})
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def _copy_companions(source: str | Path, folder: Path) -> None:
    """Copy tokenizer, processor and licence files that `folder` does not have yet."""
    origin = Path(source)
    if not origin.is_dir():
        origin = Path(snapshot_download(str(source), allow_patterns=list(_COMPANIONS)))
    for pattern in _COMPANIONS:
        for path in origin.glob(pattern):
            target = folder / path.relative_to(origin)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
