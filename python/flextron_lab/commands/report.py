"""Measure the budgets of a checkpoint and write one HTML page of figures into it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli.printing import say

EXAMPLE = "flextron report elastic/"


def options(parser: ArgumentParser) -> None:
    parser.add_argument("directory", help="elastic checkpoint to report on; it must be profiled")
    shared.data(parser)
    shared.budgets(parser, (0.5, 0.6, 0.7, 0.8, 0.9))
    shared.judged(parser, rounds=5)
    shared.placed(parser)


def run(args: Namespace) -> dict[str, Any]:
    from flextron import ui
    from flextron_lab.report import report

    with ui.reporter() as progress:
        path = report(
            args.directory,
            data=shared.text_of(args),
            budgets=args.budgets,
            samples=args.samples,
            length=args.length,
            rounds=args.rounds,
            dtype=args.dtype,
            device=args.device,
            progress=progress,
        )
    say(args, str(path))
    return {"page": str(path)}
