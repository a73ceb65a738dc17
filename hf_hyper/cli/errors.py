"""From exceptions to one paragraph on stderr and an exit code."""

import sys
import traceback
from collections.abc import Callable

from hf_hyper.errors import HyperError

__all__ = ["UsageError", "guarded"]

SUCCESS, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(Exception):
    """The command line asks for something that cannot be: exit code 2."""


def guarded(run: Callable[[], None], *, debug: bool) -> int:
    """Run a command and return its exit code; errors are printed, not raised.

    Args:
        run: The command.
        debug: Print the traceback before the message.
    """
    try:
        run()
        return SUCCESS
    except KeyboardInterrupt:
        return _print("interrupted", INTERRUPTED, debug)
    except UsageError as error:
        return _print(str(error), USAGE, debug)
    except (HyperError, OSError, ImportError) as error:
        return _print(str(error) or type(error).__name__, FAILURE, debug)
    except Exception as error:
        hint = "" if debug else " (not an expected error: --debug shows where it comes from)"
        return _print(f"{type(error).__name__}: {error}{hint}", FAILURE, debug)


def _print(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"hf-hyper: {' '.join(message.split())}", file=sys.stderr)
    return code
