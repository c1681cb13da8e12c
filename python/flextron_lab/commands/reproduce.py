"""Run the study of python/studies, or continue it."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from flextron.cli import values
from flextron.cli.printing import say

EXAMPLE = "flextron reproduce --out study/"


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", default="study", help="folder of the study; what is there already is not done again")
    add(
        "--parents",
        type=values.names,
        default=("stories260k",),
        metavar="P,P",
        help="parents to study: stories260k, stories15m",
    )
    add(
        "--seeds", type=values.wholes, default=(0, 1, 2), metavar="N,N,..", help="seeds to run every arm with"
    )
    add(
        "--stages",
        type=values.names,
        metavar="S,S,..",
        help="stages to run: prepare, profile, train, route, adaptive, latency; all by default. profile and latency "
        "want a quiet machine",
    )
    add(
        "--minutes",
        type=values.real,
        help="minutes after which no further run begins; call again to go on with the rest",
    )
    add(
        "--results",
        metavar="CSV",
        help="results.csv of an earlier study: write its summary and page into --out, and run nothing",
    )


def run(args: Namespace) -> dict[str, Any]:
    from flextron import ui
    from flextron_lab.study.results import read, rows_of, write
    from flextron_lab.study.run import STAGES, Study

    if args.results is not None:
        return _written(args, write(read(args.results), args.out), finished=True)
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    with ui.reporter() as progress:
        studies = [Study(parent, Path(args.out) / parent, args.seeds, progress) for parent in args.parents]
        finished = [study.run(args.stages or STAGES, deadline) for study in studies]
    written = write([row for study in studies for row in rows_of(study)], args.out)
    return _written(args, written, finished=all(finished))


def _written(args: Namespace, files: list[Path], finished: bool) -> dict[str, Any]:
    if not finished:
        say(args, "not finished: call again to go on")
    for path in files:
        say(args, str(path))
    return {"finished": finished, "files": [str(path) for path in files]}
