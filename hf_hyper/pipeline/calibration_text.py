"""Tokens to calibrate on, from any source a user may name."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from hf_hyper.errors import ConfigError
from hf_hyper.eval.data import TextSource, load_text
from hf_hyper.pipeline.stack import is_encoder, text_lengths

__all__ = ["WINDOW", "calibration_windows"]

WINDOW = 512
"""Tokens of text that are run together, fewer where the model takes fewer."""

FRAMED_WINDOW = 256
"""Tokens of a window of an encoder, which holds texts of several lengths (`stack.text_lengths`)."""

_BUNDLED = Path(__file__).parent / "texts" / "calibration.txt"
_OWN_BATCH = 16


def calibration_windows(model: PreTrainedModel, source: TextSource, tokens: int, seed: int) -> Tensor:
    """Token windows that are spread evenly over a text.

    Args:
        model: The model to calibrate; its tokenizer is found where it was loaded from.
        source: `"default"` for the text that comes with the package, `"self"` for text that the model writes, else
            whatever `eval.load_text` takes: a file, a data set (its training split unless it names one), a list of
            strings.
        tokens: How many, at most.
        seed: Of what the model writes.

    Returns:
        `[n, length]` int64 with `n * length` at most `tokens` and length at most `WINDOW`, of an encoder at most
        `FRAMED_WINDOW`; its texts begin and end as its tokenizer begins and ends them.

    Raises:
        ConfigError: The source cannot be used, or is too short for two windows.
    """
    encoder = is_encoder(model)
    length = min(FRAMED_WINDOW if encoder else WINDOW, _longest(model), tokens // 2)
    if length < 2:
        raise ConfigError(f"calibration_tokens is {tokens}, wanted enough for two windows; 32768 is a good number")
    if isinstance(source, str) and source == "self":
        return _written(model, tokens // length, length, seed)
    text = _BUNDLED.read_text(encoding="utf-8") if source == "default" else load_text(source, split="train")
    tokenizer = _tokenizer(model)
    before, after = _frame(tokenizer) if encoder else ([], [])
    bodies = [own - len(before) - len(after) for own in text_lengths(model, length)]
    if min(bodies) < 1:
        raise ConfigError(
            f"calibration_tokens is {tokens}, wanted room for text between the tokens that mark its ends; 32768 is a "
            "good number"
        )
    body = sum(bodies)
    ids = torch.tensor(tokenizer(text, add_special_tokens=not encoder, verbose=False)["input_ids"], dtype=torch.int64)
    available = len(ids) // body
    if available < 2:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens, wanted at least {2 * body}; give a longer text and more "
            "calibration_tokens, or calibration='default'"
        )
    wanted = min(available, tokens // length)
    chosen = torch.arange(wanted) * available // wanted
    rows = ids[: available * body].view(available, body)[chosen]
    first, last = (torch.tensor([end] * wanted, dtype=torch.int64) for end in (before, after))
    return torch.cat([part for own in rows.split(bodies, 1) for part in (first, own, last)], 1)


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer puts before and after a text."""
    text = "a"
    framed, plain = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
    start = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
    return framed[:start], framed[start + len(plain) :]


def _written(model: Any, count: int, length: int, seed: int) -> Tensor:
    """Windows sampled from the model at temperature 1, each begun with the token that begins texts or a random one."""
    if not model.can_generate():
        raise ConfigError(f"{type(model).__name__} cannot write text; give calibration a text instead of 'self'")
    draw = torch.Generator().manual_seed(seed)
    start = model.generation_config.bos_token_id if model.generation_config is not None else None
    windows = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for begin in range(0, count, _OWN_BATCH):
            size = min(_OWN_BATCH, count - begin)
            vocabulary = model.get_input_embeddings().weight.shape[0]
            first = torch.randint(vocabulary, (size, 1), generator=draw)
            prompt = first if start is None else torch.cat([torch.full_like(first, start), first], 1)
            settings: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0}
            windows.append(
                model.generate(
                    inputs=prompt.to(model.device),
                    attention_mask=torch.ones_like(prompt).to(model.device),
                    do_sample=True,
                    min_new_tokens=length - prompt.shape[1],
                    max_new_tokens=length - prompt.shape[1],
                    pad_token_id=0,
                    **settings,
                )
            )
    return torch.cat(windows).cpu()


def _tokenizer(model: PreTrainedModel) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer was found beside the model {model.name_or_path!r}, and calibration text needs one; save the "
            "tokenizer into the same folder, or use calibration='self'"
        ) from error


def _longest(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(limit := getattr(config, name, None), int) and limit > 0:
            return limit
    return WINDOW
