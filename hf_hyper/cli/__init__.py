"""The command `hf-hyper`: argument parsing and printing only.

Every command is one file with `add` (its options) and `run` (its work), and imports what it needs inside `run`. Exit
codes: 0 success, 1 failure, 2 bad usage, 130 interrupted. An error is one paragraph on stderr; `--debug` adds the
traceback.
"""

import argparse
from collections.abc import Sequence

from hf_hyper.cli import compress, demo, evaluate, info
from hf_hyper.cli.errors import guarded
from hf_hyper.cli.progress import quiet_unless_watched

__all__ = ["main"]

_COMMANDS = {"compress": compress, "eval": evaluate, "info": info, "demo": demo}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments without the program's name, by default those of the process.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    quiet_unless_watched()
    return guarded(lambda: arguments.run(arguments), debug=arguments.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-hyper", description="Hyper-compression of transformers models.")
    parser.set_defaults(debug=False)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").split(": ", 1)[1].partition("\n")[0]
        command = commands.add_parser(name, parents=[common], help=summary, description=summary)
        module.add(command)
        command.set_defaults(run=module.run)
    return parser
