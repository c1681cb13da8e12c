"""Tokenise text once, in parallel, into a folder that every stage takes as its --data; a killed run goes on."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import Any

from flextron.cli import options as shared
from flextron.cli import values
from flextron.cli.printing import say

EXAMPLE = "flextron tokenize books/ web.jsonl tokens/ --model elastic/"


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="source",
        help="text to tokenise: files, folders (.txt, .md, .jsonl, .json, .csv, .parquet; also .xz, .gz, .zst), or "
        "hf:owner/name[split], which streams; several are one stream, in this order",
    )
    add("directory", help="folder to write the tokens into; new, empty, or begun by the same command")
    add("--model", required=True, metavar="DIR", help="directory or hub id of the model with the tokenizer")
    add(
        "--field",
        help='column or key of the sources that holds the text; "text", or the only one, by default',
    )
    add(
        "--held-out",
        type=values.real,
        default=0.05,
        help="share of the documents that stages judge by and do not train on",
    )
    add("--workers", type=values.count, help="number of processes; by default one for each core")
    shared.restart(parser)


def run(args: Namespace) -> dict[str, Any]:
    from flextron import ui
    from flextron.documents import Text
    from flextron.tokens.writing import tokenize

    with ui.reporter() as reporter:

        def progress(what: str, done: int, total: int, note: str) -> None:
            reporter.note(note)
            reporter(what, done, total)

        report = tokenize(
            [Text(source, args.field) for source in args.sources],
            args.directory,
            args.model,
            held_out=args.held_out,
            workers=args.workers,
            restart=args.restart,
            progress=progress,
        )
    new = report.tokens - report.resumed
    speed = (
        f"; {new / report.seconds:.0f} tokens/s in this run" if new else "; every file is as it was written"
    )
    say(
        args,
        f"{args.directory}: {report.tokens} tokens ({report.held_out} of them held out) of "
        f"{report.documents} documents in {report.files} files{speed}",
    )
    return asdict(report)
