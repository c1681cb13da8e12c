"""Let the parent write text to train on, where there is no corpus; a killed run goes on."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli import values
from flextron.cli.printing import say

EXAMPLE = "flextron sample elastic/ text.jsonl --tokens 250000"


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", help="elastic checkpoint whose full network writes; best right after convert")
    add("file", help="file of JSON lines to write, which every stage takes as its --data")
    add("--tokens", type=values.count, default=250_000, help="tokens to write at least")
    add("--length", type=values.at_least(2), default=512, help="tokens in a document at most")
    add("--batch-size", type=values.count, default=32, help="number of documents written at once")
    add("--temperature", type=values.real, default=1.0, help="number that logits are divided by")
    add("--seed", type=values.whole, default=0, help="seed of what is drawn")
    shared.restart(parser)
    shared.placed(parser)


def run(args: Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui

    names = ("tokens", "length", "batch_size", "temperature", "seed", "restart", "dtype", "device")
    with ui.reporter() as progress:
        report = pipeline.sample(
            args.directory, args.file, progress=progress, **{name: getattr(args, name) for name in names}
        )
    there = f", {report['resumed']} of them there already" * bool(report["resumed"])
    say(args, f"{args.file}: {report['tokens']} tokens in {report['documents']} documents{there}")
    return report
