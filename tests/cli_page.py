"""The second part of docs/cli.md, made from the parser of the command line: python tests/cli_page.py --update

Without --update it compares, and says whether the page is that of the parser.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import made_page

from flextron.cli.discovery import commands as found
from flextron.cli.parser import parser_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
MARK = "<!-- Everything below is made by: python tests/cli_page.py --update -->\n"


def commands() -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """What each command is for, in the order of --help, and its parser."""
    action = next(a for a in parser_of(found())._actions if isinstance(a, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help for choice in action._choices_actions}
    return {name: (summaries[name], parser) for name, parser in action.choices.items()}


def rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.dest == "json":
            continue  # every command's
        name = ", ".join(action.option_strings) or action.dest
        value = formatter._format_args(action, action.dest.upper()) if action.option_strings else ""
        meaning = formatter._expand_help(action) if action.help else ""
        cell = f"{name} {value}".strip().replace("|", "\\|")
        yield f"| `{cell}` | {meaning.replace('|', chr(92) + '|')} |"


def made() -> str:
    parts = []
    for name, (summary, parser) in commands().items():
        example = (parser.epilog or "").removeprefix("example: ")
        parts += [f"## `flextron {name}`\n", f"{summary[0].upper()}{summary[1:]}.\n"]
        parts += [f"```bash\n{example}\n```\n", "| argument | meaning |", "| --- | --- |", *rows(parser), ""]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(made_page.run(PAGE, MARK, made(), "what the parser says"))
