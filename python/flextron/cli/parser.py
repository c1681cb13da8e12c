"""The parser of the command line, which says in one sentence what is wrong with it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from flextron.cli.discovery import Command
from flextron.cli.processes import IN_SEVERAL
from flextron.cli.version import installed

# argparse's sentences, and ours. What it says about a value is in our words already: see values.py.
_REPHRASED = (
    (r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)", r"\1 must be one of \3, got \2"),
    (r"argument (\S+): expected (?:one|1) argument", r"\1 must be followed by a value, got none"),
    (r"argument (\S+): not allowed with argument (\S+)", r"\1 must not be given with \2, got both"),
    (r"argument (\S+): ignored explicit argument (.+)", r"\1 must be given without a value, got \2"),
    (r"argument (\S+): (.+)", r"\1 \2"),
    (r"the following arguments are required: (.+)", r"\1 must be given, got nothing"),
    (r"unrecognized arguments: (.+)", r"arguments must be among those that --help lists, got \1"),
    (r"ambiguous option: (\S+) could match (.+)", r"options must be written out as one of \2, got \1"),
)


class UsageError(ValueError):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _, _, command = self.prog.partition(" ")
        for theirs, ours in _REPHRASED:
            if found := re.fullmatch(theirs, message, re.DOTALL):
                message = found.expand(ours)
                break
        raise UsageError(f"{command}: {message}" if command else message)


class _Help(argparse.HelpFormatter):
    """Appends an option's default, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if not action.option_strings or default is None or default is False or default == argparse.SUPPRESS:
            return text
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        return f"{text} (default: {shown})"


class _Version(argparse.Action):
    """Prints what this installation is, in two lines."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print("\n".join(installed()))
        parser.exit()


def parser_of(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of these commands."""
    parser = _Parser(
        prog="flextron",
        description="Elastic language models: one checkpoint that runs at any latency target.",
        epilog=f"`torchrun --nproc-per-node N -m flextron COMMAND ...` runs {IN_SEVERAL} in N processes.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print versions and what the ops were built for, and exit"
    )
    adding = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        summary = (command.__doc__ or "").partition("\n")[0].rstrip(".")
        own = adding.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example: {command.EXAMPLE}",
            formatter_class=_Help,
        )
        command.options(own)
        own.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    return parser
