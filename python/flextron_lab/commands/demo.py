"""Take a real model through every stage, to a table, a picture and a sample of text."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from flextron.cli import options as shared
from flextron.cli import values

EXAMPLE = "flextron demo --parent tiny"


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--parent",
        default="smollm2",
        help="model to begin with: tiny, smollm2, stories260k, a model directory or a hub id",
    )
    add("--out", help="folder to write everything into; demo-out/PARENT by default")
    shared.data(parser)
    add("--seed", type=values.whole, default=0, help="seed of every random draw")


def run(args: Namespace) -> dict[str, Any] | list[dict[str, Any]]:
    from flextron import ui
    from flextron_lab.demo.parents import tiny_parents
    from flextron_lab.demo.run import run as demonstrate

    out = Path(args.out or Path("demo-out") / Path(args.parent).name)
    # "tiny" takes the real small model too, where its files are
    parents = tiny_parents() if args.parent == "tiny" else (args.parent,)
    reports = []
    for parent in parents:
        folder = out if parent == parents[0] else out / parent
        with ui.reporter() as progress:
            report = demonstrate(parent, folder, data=shared.text_of(args), seed=args.seed, progress=progress)
        reports.append(report)
        if not args.json:
            _print(report, folder)
    return reports[0] if len(reports) == 1 else reports


def _print(report: dict[str, Any], folder: Path) -> None:
    from flextron import ui

    ui.print_budgets(f"{report['parent']}: {report['workload']}", report["budgets"])
    table, fit, gate = report["table"], report["surrogate"], report["gate"]
    print(
        f"parity {report['parity']['max_rel']:.1e}; latency table error median "
        f"{100 * table['residual_median']:.1f} %, worst {100 * table['residual_worst']:.1f} %; "
        f"surrogate R² {fit['r2']:.3f}, rank {fit['rank']:.3f}, {gate['steps_below']} of "
        f"{gate['steps_below'] + gate['steps_above']} router steps below its gate of {gate['threshold']} nats; "
        f"{report['seconds']['total']:.0f} s"
    )
    print((folder / "sample.txt").read_text(encoding="utf-8"))
    print(f"{folder}: elastic/ extracted/ report.json report.png losses.png sample.txt\n")
