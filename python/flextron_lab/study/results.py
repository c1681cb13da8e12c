"""The study's results: a CSV row for each run, means and spreads of each comparison, and the page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from flextron_lab.report import Section, figures, render
from flextron_lab.study.plan import PLANS
from flextron_lab.study.run import Row, Study

COLUMNS = (
    "parent", "comparison", "arm", "seed", "budget", "tokens", "loss", "measured_ms", "full_ms", "predicted_ms",
    "params", "router_seconds", "mlp", "heads",
)  # fmt: skip

# comparison -> (question, {the arm's name on the page: (the arm's name in the rows, whether it is trained)})
COMPARISONS = {
    "a": (
        "Importance order against none and random, uniform widths, after the same training",
        {
            "importance": ("importance order", True),
            "none": ("no order", True),
            "random": ("random order", True),
            "importance, untrained": ("importance order", False),
            "none, untrained": ("no order", False),
            "random, untrained": ("random order", False),
        },
    ),
    "b": (
        "Elastic training against none, and against the same training of the full width alone",
        {
            "none": ("importance order", False),
            "elastic, distillation": ("importance order", True),
            "elastic, cross-entropy": ("cross-entropy", True),
            "full width only, cross-entropy": ("full width only", True),
        },
    ),
    "c": (
        "Sub-networks against models of the same shape trained alone on the same tokens",
        {"elastic": ("importance order", True)},
    ),
    "d": (
        "Uniform widths against static routers and search, in the same elastic model",
        {
            "uniform": ("importance order", True),
            "routed": ("static routers", True),
            "searched": ("searched", True),
        },
    ),
    "e": (
        "Static against input-adaptive routers at equal mean latency",
        {
            "static": ("static routers", True),
            "input-adaptive": ("adaptive routers", True),
            "input-adaptive by surrogate": ("adaptive routers by surrogate", True),
        },
    ),
    "f": (
        "Static routers that learn from the surrogate against end to end, through the model",
        {"surrogate": ("static routers", True), "end to end": ("end to end", True)},
    ),
    "g": (
        "Distillation against cross-entropy",
        {"distillation": ("importance order", True), "cross-entropy": ("cross-entropy", True)},
    ),
}


def rows_of(study: Study) -> list[Row]:
    """The rows of every comparison; a run that several comparisons share has a row in each of them."""
    done = study.done()
    times = _times(done)
    runs = [row for record in done.values() for row in record["rows"] if "arm" in row]
    found = []
    for comparison, (_, arms) in COMPARISONS.items():
        arms = dict(arms)
        if comparison == "c":
            arms |= {name: (name, True) for name in study.plan.arms() if name.startswith("alone")}
        for shown, (arm, trained) in arms.items():
            for run in runs:
                if run["arm"] != arm or (run["tokens"] > 0) != trained:
                    continue
                if comparison == "c" and run["budget"] not in study.plan.alone:
                    continue
                key = (
                    (tuple(run["mlp"]), tuple(run["heads"]))
                    if "mlp" in run
                    else (run["arm"], run["seed"], run["budget"])
                )
                timed = times.get(key, {})
                found.append(
                    {
                        **{
                            name: run.get(name)
                            for name in (
                                "seed",
                                "budget",
                                "tokens",
                                "loss",
                                "predicted_ms",
                                "params",
                                "router_seconds",
                            )
                        },
                        "parent": study.plan.parent,
                        "comparison": comparison,
                        "arm": shown,
                        "measured_ms": timed.get("measured_ms"),
                        "full_ms": timed.get("full_ms"),
                        "mlp": run.get("mlp"),
                        "heads": run.get("heads"),
                    }
                )
    return found


def _write_csv(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Write rows; the widths of layers are separated by spaces, and a value that was not measured is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_cell(row[column]) for column in columns])


def read(path: str | Path) -> list[Row]:
    """The rows of a ``results.csv``."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: the columns must be {', '.join(COLUMNS)}, got {reader.fieldnames}")
        return [{name: _value(name, text) for name, text in row.items()} for row in reader]


def _value(name: str, text: str) -> Any:
    if name in ("parent", "comparison", "arm"):
        return text
    if not text:
        return None
    if name in ("mlp", "heads"):
        return [int(width) for width in text.split()]
    return int(text) if name in ("seed", "tokens", "params") else float(text)


def write(rows: Sequence[Row], out: str | Path) -> list[Path]:
    """Write ``results.csv``, ``summary.csv`` and ``study.html``, of the comparisons that have several arms so far."""
    rows = _compared(rows)
    if not rows:
        return []
    paths = [Path(out) / name for name in ("results.csv", "summary.csv", "study.html")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    _write_csv(rows, COLUMNS, paths[0])
    found = summary(rows)
    _write_csv(found, tuple(found[0]), paths[1])
    paths[2].write_text(page(rows), encoding="utf-8")
    return paths


def summary(rows: Sequence[Row]) -> list[Row]:
    """Mean loss, its standard deviation over seeds and the mean latency of each arm at each budget."""
    groups: dict[tuple[str, str, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["parent"], row["comparison"], row["arm"], row["budget"]), []).append(row)
    found = []
    for (parent, comparison, arm, budget), some in groups.items():
        losses = [row["loss"] for row in some]
        measured = [row["measured_ms"] / row["full_ms"] for row in some if row["measured_ms"]]
        found.append(
            {
                "parent": parent,
                "comparison": comparison,
                "arm": arm,
                "budget": budget,
                "seeds": len(some),
                "loss": mean(losses),
                "spread": stdev(losses) if len(losses) > 1 else 0.0,
                "of_full": mean(measured) if measured else None,
                "tokens": max(row["tokens"] for row in some),
            }
        )
    return found


def page(rows: Sequence[Row]) -> str:
    """The study as an HTML page."""
    sections = []
    for parent in dict.fromkeys(row["parent"] for row in rows):
        of_parent = summary([row for row in rows if row["parent"] == parent])
        for comparison, (question, _) in COMPARISONS.items():
            some = [s for s in of_parent if s["comparison"] == comparison]
            if some:
                sections.append(_section(parent, comparison, question, some))
    seen = ", ".join(dict.fromkeys(row["parent"] for row in rows))
    lead = f"Parents: {seen}. Losses are held-out, in nats per token; bars are one standard deviation over seeds."
    return render("What elastic models gain, measured", lead, sections)


def _section(parent: str, comparison: str, question: str, some: Sequence[Row]) -> Section:
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for s in some:
        lines.setdefault(s["arm"].partition(" at ")[0], []).append(
            (s["of_full"] or s["budget"], s["loss"], s["spread"])
        )
    measured = all(s["of_full"] for s in some)
    xlabel = "measured latency, of the full model's" if measured else "budget, of the full model's latency"
    known = PLANS[parent].pretraining_tokens
    tokens = max(s["tokens"] for s in some)
    share = (
        f", {100 * tokens / known:.4f} % of the parent's own"
        if known
        else "; the parent's own are not stated"
    )
    table = [
        [
            s["arm"],
            f"{s['budget']:g}",
            f"{s['loss']:.3f}",
            f"{s['spread']:.3f}",
            f"{s['of_full']:.3f}" if s["of_full"] else "not measured",
            str(s["seeds"]),
        ]
        for s in some
    ]
    return Section(
        f"{parent} ({comparison}): {question}",
        f"{tokens:,} tokens of training{share}.",
        [figures.comparison({"": lines}, xlabel, "held-out loss, nats a token")],
        ["arm", "budget", "loss", "spread", "latency, of full", "seeds"],
        table,
    )


def _compared(rows: Sequence[Row]) -> list[Row]:
    """The rows of those comparisons of which more than one arm has been run."""
    arms: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        arms.setdefault((row["parent"], row["comparison"]), set()).add(row["arm"])
    return [row for row in rows if len(arms[row["parent"], row["comparison"]]) > 1]


def _times(done: dict[str, Row]) -> dict[tuple[Any, ...], Row]:
    """The last measurement, which timed all networks side by side: a network's key -> its row.

    The key is (MLP widths, head counts), or (arm, seed, budget) for an adaptive router.
    """
    timed = [record["rows"] for job, record in done.items() if job.startswith("latency")]
    if not timed:
        return {}
    return {
        tuple(row["timed_adaptive"])
        if "timed_adaptive" in row
        else (tuple(row["timed"]["mlp"]), tuple(row["timed"]["heads"])): row
        for row in timed[-1]
    }


def _cell(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
