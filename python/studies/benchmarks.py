"""Six benchmarks of a parent and of its elastic checkpoint at a list of budgets, on the same drawn questions.

Every network's answers are kept question by question, so that networks can be compared in pairs: what one knows more
than another is told much more exactly than either's score. Each benchmark of each network is done once:

    python python/studies/benchmarks.py study/benchmarks --parent smollm2 --checkpoint demo/elastic
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flextron import from_pretrained, ui
from flextron.checkpoint import Origin
from flextron.checkpoint.hf import read_tokenizer
from flextron.nn import make_elastic
from flextron_lab import tasks
from flextron_lab.demo import stories
from flextron_lab.demo.parents import load_parent
from flextron_lab.study.rows import append_row, rows_in

PARENT = "parent"
NAMES = ("lambada_openai", "arc_easy", "piqa", "winogrande", "hellaswag", "mmlu")
Row = dict[str, Any]
Progress = Callable[[str, int, int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the study")
    parser.add_argument("--parent", default="smollm2", help="as `flextron demo` takes it")
    parser.add_argument(
        "--checkpoint", type=Path, help="an elastic checkpoint of it; without one, the parent alone"
    )
    parser.add_argument("--budgets", default="1,0.9,0.7")
    parser.add_argument("--tasks", default=",".join(NAMES))
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="in which all compute"
    )
    parser.add_argument("--questions", type=int, default=150, help="drawn of each benchmark")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    with ui.reporter() as progress:
        for _ in missing(args, progress):
            if time.monotonic() > end:
                break
    kept = networks(args).items()
    show(
        [row for row in rows_in(args.out) if (row["key"]["network"], row["key"]["weights"]) in kept],
        args.questions,
    )


def networks(args: argparse.Namespace) -> dict[str, str]:
    """What is asked: the parent and budgets of the checkpoint, each with the identity of its weights."""
    budgets = args.budgets.split(",") if args.checkpoint else ()
    found = {PARENT: args.parent} | {b: Origin.read(args.checkpoint).weights for b in budgets}
    return {network: f"{weights} in {args.dtype}" for network, weights in found.items()}


def missing(args: argparse.Namespace, progress: Progress) -> Iterator[Row]:
    """Ask every network what it was not asked yet, one benchmark after the other, and append the rows."""
    names, folder = args.tasks.split(","), stories.data_folder() / "benchmarks"
    tasks.check(names, folder)

    @cache
    def parent() -> tuple[Any, Any]:
        """By the elastic model's code, which is faster than stock code for few tokens, and proven to say the same."""
        found = load_parent(args.parent, progress=progress)
        return make_elastic(found.model.to(getattr(torch, args.dtype))), found.tokenizer

    @cache
    def elastic() -> tuple[Any, Any]:
        return from_pretrained(args.checkpoint, dtype=args.dtype), read_tokenizer(args.checkpoint)

    for name in names:
        loaded = None
        for network, weights in networks(args).items():
            key = {"network": network, "weights": weights, "task": name, "questions": args.questions}
            if any(row["key"] == key for row in rows_in(args.out)):
                continue
            loaded = loaded or tasks.load(name, folder, args.questions)
            began = time.perf_counter()
            model, tokenizer = parent() if network == PARENT else elastic()
            with contextlib.nullcontext() if network == PARENT else model.budget(float(network)):
                scores = tasks.score(model, tokenizer, loaded)
            row = {"key": key, "seconds": round(time.perf_counter() - began, 1), "scores": scores}
            append_row(args.out, row)
            progress(f"{name} of {network}", 1, 1)
            yield row


def show(rows: list[Row], questions: int) -> None:
    """Print each metric of each network with its standard error; behind the parent's, what is gained or lost to it."""
    rows = [row for row in rows if row["key"]["questions"] == questions]
    parents = {row["key"]["task"]: row["scores"] for row in rows if row["key"]["network"] == PARENT}
    cells = []
    for row in sorted(rows, key=lambda row: NAMES.index(row["key"]["task"])):
        key, found = row["key"], tasks.summary(row["scores"])
        for metric, values in row["scores"].items():
            before = parents.get(key["task"], {}).get(metric)
            more = ""
            if before and key["network"] != PARENT:
                own = tasks.summary({"acc": [b - a for a, b in zip(before, values, strict=True)]})
                more = f"{own['acc']:+.3f} ({own['acc_error']:.3f})"
            label = "log-likelihood" if metric == "perplexity" else metric
            value = f"{found[metric]:.3f} ({found[f'{metric}_error']:.3f})"
            cells.append([key["task"], metric, key["network"], value, more, label, f"{row['seconds']:g}"])
    header = ["benchmark", "metric", "network", "score", "beside the parent", "in", "seconds"]
    ui.print_table(f"{questions} questions of each (standard error)", header, cells)


if __name__ == "__main__":
    main()
