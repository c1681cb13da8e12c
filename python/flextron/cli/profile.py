"""Measure the latency table of a checkpoint on this machine."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli import values
from flextron.cli.printing import warn

EXAMPLE = "flextron profile elastic/ --length 512"


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", help="elastic checkpoint to measure; its tables are stored there")
    add(
        "--phase",
        choices=("prefill", "decode", "both"),
        default="both",
        help="phase to measure: a whole prompt at once (prefill), one token after a cache (decode), or both",
    )
    add("--length", type=values.count, default=512, help="tokens in a prompt")
    add("--context", type=values.count, default=512, help="tokens in the cache of a decode step")
    add("--batch", type=values.count, default=1, help="sequences that run side by side")
    add("--rounds", type=values.count, default=7, help="samples to take of each latency")
    add(
        "--seed",
        type=values.whole,
        default=0,
        help="seed of the random configurations that the fitted table is judged on",
    )
    shared.placed(parser)


def run(args: Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui
    from flextron.artefacts.latency_table import Workload

    workloads = []
    if args.phase != "decode":
        workloads.append(Workload.prefill(args.length, batch=args.batch))
    if args.phase != "prefill":
        workloads.append(Workload.decode(args.context, batch=args.batch))
    with ui.reporter() as progress:
        tables = pipeline.profile(
            args.directory,
            workloads,
            rounds=args.rounds,
            seed=args.seed,
            dtype=args.dtype,
            device=args.device,
            progress=progress,
        )
    if not args.json:
        rows = [
            [
                name,
                f"{table.full_ms:.1f}",
                f"{table.smallest_ms:.1f}",
                f"{100 * table.residual_median:.1f} %",
                f"{100 * table.residual_worst:.1f} %",
            ]
            for name, table in tables.items()
        ]
        header = ["phase", "full ms", "smallest ms", "median error", "worst error"]
        ui.print_table("latency, and error on configurations not fitted", header, rows)
        for table in tables.values():
            for warning in table.warnings:
                warn(warning)
    return {name: table.to_dict() for name, table in tables.items()}
