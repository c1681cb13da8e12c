"""The command line: finds a command, runs it, and says in one sentence what went wrong.

Each command is a module: its docstring is the command's summary, ``EXAMPLE`` a call of it, ``options`` adds its
arguments to a parser, and ``run`` does the work, prints, and returns what ``--json`` prints instead.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Sequence

from flextron.cli.discovery import commands, extension, is_missing
from flextron.cli.parser import UsageError, parser_of
from flextron.cli.printing import warn
from flextron.cli.processes import is_silent, is_started, run, tell_torchrun
from flextron.cli.threads import settle
from flextron.sentences import first_line

# Errors that the user can mend: one sentence and exit code 2. Any other is a fault of ours and keeps its traceback.
_EXPECTED = (ValueError, OSError, NotImplementedError, FloatingPointError)

_LEFT = 3.0  # seconds for another process to say what is wrong with the command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # The commands show progress themselves, and transformers' remarks on files that are used anyway help nobody.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else ten lines about retries precede our sentence
    settle()
    with warnings.catch_warnings():
        warnings.showwarning = warn  # type: ignore[assignment]  # of its arguments one is enough
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    try:
        found = commands()
        asked = next((word for word in argv if not word.startswith("-")), "")
        if is_missing(asked, found):
            extension(asked, asked)
        args = parser_of(found).parse_args(argv)
    except (UsageError, ValueError) as error:
        if is_silent():
            time.sleep(_LEFT)  # torchrun stops all processes once one has ended, the one that speaks too
            return 2
        return _refuse(str(error))
    try:
        result = run(found[args.command], args)
    except ModuleNotFoundError as error:
        if (error.name or "flextron").partition(".")[0] in ("flextron", "flextron_ext", "flextron_lab"):
            raise
        return _refuse(f"{args.command} needs {error.name}; pip install 'flextron[all]'")
    except _EXPECTED as error:
        return _refuse(_said(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _refuse(
            f"{args.command}: lengths, batches and models must fit into memory, got {first_line(error)}"
        )
    except KeyboardInterrupt:
        print(f"flextron: {args.command} interrupted", file=sys.stderr)
        return 130
    if args.json and (not is_started() or os.environ["RANK"] == "0"):
        print(json.dumps(result, indent=2))
    return 0


def _refuse(sentence: str) -> int:
    print(f"flextron: {sentence}", file=sys.stderr)
    tell_torchrun(f"flextron: {sentence}")
    return 2


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch was refused memory; torch on a CPU has no class of its own for that."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or "can't allocate memory" in str(error)


def _said(error: Exception) -> str:
    """What an error says, in one sentence; the library's own begin with its name, as what is printed does."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename} must be usable, got {error.strerror[:1].lower()}{error.strerror[1:]}"
    return first_line(error).removeprefix("flextron: ")
