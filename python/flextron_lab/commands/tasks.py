"""Run benchmarks of lm-evaluation-harness at a list of budgets: ``flextron eval --tasks``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from flextron.cli import packing


def run(args: Namespace) -> list[dict[str, Any]]:
    from flextron import ui
    from flextron.checkpoint.hf import read_tokenizer
    from flextron_lab import tasks
    from flextron_lab.demo import stories

    text = packing.read_text(args)
    if args.calibrate is None and text is not None:
        raise ValueError(
            "eval: --data must be given without --tasks, which have a text of their own, unless it is there to "
            "--calibrate, got both"
        )
    folder = Path(args.data_dir) if args.data_dir else stories.data_folder() / "benchmarks"
    tasks.check(args.tasks, folder)
    directory, model = packing.loaded(args, text)
    with ui.reporter() as progress:
        found = tasks.evaluate(
            model,
            read_tokenizer(directory),
            args.tasks,
            args.budgets,
            folder,
            adaptive=args.adaptive,
            limit=args.limit,
            progress=progress,
        )
    if not args.json:
        metrics = [m for m in tasks.METRICS if any(m in row for row in found)]
        rows = [
            [
                row["task"],
                f"{row['budget']:.2f}",
                *(_told(row, m) for m in metrics),
                str(row["n"]),
            ]
            for row in found
        ]
        ui.print_table(
            "benchmarks by budget (standard error)", ["task", "budget", *metrics, "questions"], rows
        )
    return found


def _told(row: dict[str, Any], metric: str) -> str:
    if metric not in row:
        return ""
    error = row.get(f"{metric}_error")
    return f"{row[metric]:.3f}" + (f" ({error:.3f})" if error is not None else "")
