"""The command line: ``rosakit tune | eval | generate | info``.

Each command is one call into the packages below. Errors that rosakit raises on purpose become one
line on standard error and exit code 2; ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence

__all__ = ["main"]

_EXTRAS = {
    **dict.fromkeys(("transformers", "accelerate", "peft", "datasets", "safetensors"), "tune"),
    **dict.fromkeys(("tokenizers", "typer", "yaml", "rich", "matplotlib", "pyarrow"), "tune"),
    "gguf": "gguf",
    "lm_eval": "eval",
}
"""Which extra installs a package that may be missing."""

USAGE, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: without the program's name; None for those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Accepted anywhere, since it is added to a command that has just failed.
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        from rosakit.cli.app import build

        with warnings.catch_warnings():
            vars(warnings)["showwarning"] = _one_line
            build()(args=arguments, prog_name="rosakit")
    except Exception as error:
        if debug:
            raise
        message, code = _explain(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code)
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _one_line(message: Warning | str, *place: object, **more: object) -> None:
    """A warning as users of the command line read it: without the line of code that gave it."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _explain(error: Exception) -> tuple[str, int]:
    """One line for an error, and the exit code."""
    from rosakit.errors import RosakitError

    if isinstance(error, RosakitError):
        return " ".join(str(error).split()), USAGE
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in _EXTRAS:
            extra = _EXTRAS[package]
            return (
                f"the package {package!r} is missing; install it with: "
                f"pip install 'rosakit[{extra}]'",
                USAGE,
            )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"no disk space left{where}; free some and run again", USAGE
    if isinstance(error, BrokenPipeError):
        # The reader of our output is gone; keep the interpreter from flushing into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "the output was closed", 1
    text = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {text} (unexpected; run again with --debug for the traceback "
        "and report it)",
        1,
    )
