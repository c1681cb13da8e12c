"""Measure the latency table of a checkpoint on this machine."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli import values
from flextron.cli.printing import warn

EXAMPLE = "flextron profile elastic/ --batch 1,8,64"


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "directory",
        help="elastic checkpoint to measure; the tables are stored there, in a file for each machine",
    )
    add(
        "--phase",
        choices=("prefill", "decode", "both"),
        default="both",
        help="phase to measure: a whole prompt at once (prefill), one token after a cache (decode), or both",
    )
    for name, default, text in (
        ("--length", (512,), "tokens in a prompt"),
        ("--context", (512,), "tokens in the cache of a decode step"),
        ("--batch", (1,), "sequences that run side by side"),
    ):
        add(
            name,
            type=values.counts,
            default=default,
            metavar="N,N,..",
            help=f"{text}, with a table for each number",
        )
    add("--rounds", type=values.count, default=7, help="samples to take of each latency, at least")
    add(
        "--patience",
        type=values.seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long to go on after that for each table, while a configuration that it is not fitted on is off by "
        "5 %% or more, fractions are not known to 1 %%, or other programs disturb",
    )
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
        workloads += [Workload.prefill(n, batch) for batch in args.batch for n in args.length]
    if args.phase != "prefill":
        workloads += [Workload.decode(n, batch) for batch in args.batch for n in args.context]
    with ui.reporter() as progress:
        tables = pipeline.profile(
            args.directory,
            workloads,
            rounds=args.rounds,
            seed=args.seed,
            patience=args.patience,
            dtype=args.dtype,
            device=args.device,
            progress=progress,
        )
    if not args.json:
        rows = [
            [
                str(table.workload),
                f"{table.full_ms:.4g}",
                "" if table.spread_ms is None else f"{table.spread_ms:.2g}",
                f"{table.smallest_ms:.4g}",
                f"{100 * table.residual_median:.1f} %",
                f"{100 * table.residual_worst:.1f} %",
            ]
            for table in tables
            if table.workload in workloads
        ]
        header = ["workload", "full ms", "±", "smallest ms", "median error", "worst error"]
        title = f"latency on {tables[0].machine_name}, and error on configurations not fitted"
        ui.print_table(title, header, rows)
        for table in tables:
            for warning in table.warnings:
                warn(f"{table.workload}: {warning}")
            if table.doubt and table.workload in workloads:
                warn(f"{table.doubt}; `flextron route` and `flextron eval` refuse it without --accept-noise")
    return {"machine": tables[0].machine_name, "tables": [table.to_dict() for table in tables]}
