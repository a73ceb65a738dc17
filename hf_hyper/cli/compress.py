"""`hf-hyper compress`: compress a model into a folder

The folder appears under its name only when it is complete.
"""

import argparse

from hf_hyper.cli.errors import UsageError

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", metavar="SRC", help="Hub id, local folder or .gguf file")
    parser.add_argument("destination", metavar="DST", help="folder to make")
    parser.add_argument(
        "--bits", type=_rate, default=4.0, help="average bits per weight, 1 to 8, or auto with --max-kl (default: 4)"
    )
    parser.add_argument(
        "--max-kl", metavar="X", type=float, help="with --bits auto: expected divergence in nats a token, e.g. 0.05"
    )
    parser.add_argument("--hyperfunction", default="shift", help="shift or winding (default: shift)")
    parser.add_argument("--effort", default="balanced", help="fast, balanced or best (default: balanced)")
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        default="none",
        help="file, data set, 'default', 'self' or none (default: none)",
    )
    parser.add_argument(
        "--calibration-tokens", metavar="N", type=int, default=32768, help="tokens read at most (default: 32768)"
    )
    parser.add_argument("--rounding", default="fit", help="with calibration: fit, fisher, ldlq or plain (default: fit)")
    parser.add_argument(
        "--allocation", help="with calibration: loss (default, mixes rates by what the model's loss feels) or size"
    )
    parser.add_argument("--seed", type=int, default=0, help="start of the sign generator (default: 0)")
    parser.add_argument("--device", default="auto", help="where to search, e.g. cpu or cuda (default: auto)")
    parser.add_argument("--resume", action="store_true", help="use tensors that an earlier run finished")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the folder to this repository")


def run(arguments: argparse.Namespace) -> None:
    """Compress, then print what came out."""
    from hf_hyper.config import HyperConfig
    from hf_hyper.errors import ConfigError
    from hf_hyper.pipeline.compress import compress

    try:
        config = HyperConfig(
            bits=arguments.bits,
            hyperfunction=arguments.hyperfunction,
            effort=arguments.effort,
            calibration=arguments.calibration,
            calibration_tokens=arguments.calibration_tokens,
            rounding=arguments.rounding,
            allocation=arguments.allocation,
            max_kl=arguments.max_kl,
            seed=arguments.seed,
        )
    except ConfigError as error:
        raise UsageError(str(error)) from error
    report = compress(
        arguments.source,
        arguments.destination,
        config,
        device=arguments.device,
        resume=arguments.resume,
        push_to_hub=arguments.push_to_hub,
    )
    print(
        f"{arguments.destination}: {len(report.tensors)} tensors at {report.bits_per_weight:.3f} bits per weight, "
        f"{report.size_bytes / 1e6:.2f} MB on disk, {report.bytes_16bit / report.size_bytes:.2f}x smaller than 16-bit"
    )
    if report.expected_loss is not None:
        print(f"rounding was expected to cost {report.expected_loss:.3g} nats a token; hf-hyper eval measures it")
    if arguments.push_to_hub is not None:
        print(f"uploaded to {arguments.push_to_hub}")


def _rate(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'auto'") from None
