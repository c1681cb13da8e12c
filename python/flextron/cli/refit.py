"""Fit the last projection of every layer's parts for all widths at once, in place, without training."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli import values
from flextron.cli.printing import say

EXAMPLE = "flextron refit elastic/ --data corpus/"


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", help="elastic checkpoint to fit, in place; best right after convert, before train")
    shared.data(parser, written=True)
    add(
        "--samples",
        type=values.count,
        default=96,
        help="sequences to fit on; an eighth of them judges the fit",
    )
    add("--length", type=values.count, default=256, help="tokens in each of these sequences")
    add(
        "--narrower",
        type=float,
        default=0.3,
        help="how much a narrower width counts beside the full one, which counts 1: less leaves the full network "
        "nearer to the parent",
    )
    add(
        "--ridge",
        type=float,
        default=0.1,
        help="pull towards the parent's weights, as a share of the inputs' mean square: with less, the full network "
        "forgets what the text is unlike",
    )
    add(
        "--ladder",
        action="store_true",
        help="fit for the networks that the routers choose at their targets, layer after layer; the routers stay",
    )
    shared.stored_dtype(parser, "the one that each tensor has in the checkpoint")
    shared.device(parser)


def run(args: Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui

    passed = ("samples", "length", "narrower", "ridge", "ladder", "dtype", "device")
    with ui.reporter() as progress:
        report = pipeline.refit(
            args.directory,
            data=shared.text_of(args),
            progress=progress,
            **{name: getattr(args, name) for name in passed},
        )
    if not args.json:
        names = ["target"] if args.ladder else ["mlp", "heads"]
        rows = [
            [*(f"{row[name]:g}" for name in names), f"{row['before']:.3f}", f"{row['after']:.3f}"]
            for row in report["losses"]
        ]
        title = "held-out loss, nats: of the parent's weights, and of the fitted ones"
        ui.print_table(title, [*names, "before", "after"], rows)
    kept = f"; {len(report['kept'])} projections stayed, since they were better as they were" * bool(
        report["kept"]
    )
    say(args, f"{args.directory}: fitted on {report['tokens']} tokens{kept}")
    return report
