"""Does it pay to skip whole layers? SmolLM2 with menus from 0 beside the usual ones, at equal measured latency.

Both are converted, trained alike for a few steps, profiled and routed, for prompts and for decoding; then their
held-out losses are compared at the latencies that were measured. What a folder has already is not done again:

    python python/studies/depth.py study/depth --stages train
    python python/studies/depth.py study/depth --stages profile     (wants a quiet machine)
    python python/studies/depth.py study/depth --stages route
    python python/studies/depth.py study/depth --stages measure     (wants a quiet machine)
    python python/studies/depth.py study/depth --stages judge
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from flextron import pipeline, ui
from flextron.artefacts.latency_files import by_phase, load_tables, save_tables
from flextron.artefacts.latency_table import LatencyTable, Workload
from flextron.checkpoint import Origin
from flextron.checkpoint.hf import read_tokenizer
from flextron.checkpoint.io import read_json, write_json
from flextron.config import AXES, ElasticConfig, Widths
from flextron.corpus import documents, encode, held_out_windows, windows
from flextron.inference import from_pretrained
from flextron.judge.latency import measure
from flextron.judge.loss import evaluate
from flextron.recipes import RouteConfig, TrainConfig
from flextron.routing.static import train_routers
from flextron_lab.demo.parents import load_parent

MLP, HEADS = (384, 768, 1152, 1536), (1, 2, 3)
MENUS = {"widths and depth": ((0, *MLP), (0, *HEADS)), "widths": (MLP, HEADS)}
WORKLOADS = {"prefill": Workload.prefill(256), "decode": Workload.decode(256)}
TARGETS = (0.5, 0.65, 0.8)
LENGTH, JUDGED = 256, 5  # tokens of a held-out sequence, and how many there are
ROUTED = 2, 96  # sequences that the surrogate learns a loss on, and tokens in each
ROUTE = RouteConfig(
    targets=(*TARGETS, 1.0), evaluations=110, prefill=80, threshold=0.05, steps=600, surrogate_steps=400
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the study")
    parser.add_argument(
        "--stages", default="train,profile,route,measure,judge", help="what to do, in this order"
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps of each model")
    parser.add_argument("--only", choices=tuple(MENUS), help="one of the two models; both by default")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ui.reporter() as progress:
        for stage in args.stages.split(","):
            for name in MENUS if args.only is None else (args.only,):
                STAGES[stage](args, args.out / name.replace(" ", "-"), name, progress)
    if "judge" in args.stages.split(",") and args.only is None:
        print(table_of(args.out))


def train(args: argparse.Namespace, folder: Path, name: str, progress: Any) -> None:
    """Convert the parent and train it for a few steps."""
    if (folder / "trained.json").is_file():
        return
    parent = args.out / "parent"
    if not (parent / "config.json").is_file():
        load_parent("smollm2", parent, progress)
    mlp, heads = MENUS[name]
    data = encode(documents(None), read_tokenizer(parent))
    pipeline.convert(
        parent,
        folder,
        data=data,
        samples=8,
        length=LENGTH,
        mlp_choices=mlp,
        head_choices=heads,
        progress=progress,
        force=True,
    )
    config = TrainConfig(
        steps=args.steps,
        batch_size=4,
        length=128,
        learning_rate=3e-4,
        cross_entropy=0.0,
        distillation=1.0,
        weight_decay=0.0,
        eval_every=0,
        checkpoint_every=0,
    )
    report = pipeline.train(folder, config, data=data, progress=progress)
    write_json(folder / "trained.json", {"tokens": report.tokens, "losses": report.losses})


def profile(args: argparse.Namespace, folder: Path, name: str, progress: Any) -> None:
    """Time the model that may skip; the other's table is the same without the first choices: it has the same layers."""
    own, whole = Origin.read(folder).elastic, args.out / "widths-and-depth"
    if name == "widths and depth" and not load_tables(folder, own):
        pipeline.profile(folder, list(WORKLOADS.values()), rounds=5, progress=progress)
    if name == "widths":
        save_tables([narrowed(t, own) for t in load_tables(whole, Origin.read(whole).elastic)], folder)


def narrowed(table: LatencyTable, elastic: ElasticConfig) -> LatencyTable:
    """The table of menus without their first entries."""
    below = sum(costs[1] for rows in table.by_axis for costs in rows)
    entries: dict[str, Any] = {}
    for axis, rows in zip(AXES, table.by_axis, strict=True):
        entries[axis] = tuple(tuple(ms - costs[1] for ms in costs[1:]) for costs in rows)
        entries[f"raw_{axis}"] = tuple(costs[1:] for costs in getattr(table, f"raw_{axis}"))
    base = table.base + table.slope * below
    return replace(table, elastic=elastic, base=base, fitted=(), held_out=(), **entries)


def route(args: argparse.Namespace, folder: Path, name: str, progress: Any) -> None:
    """Train routers for each phase; keep the sub-networks that they and search give each target."""
    if all((folder / f"{phase}.json").is_file() for phase in WORKLOADS):
        return
    model = from_pretrained(folder).requires_grad_(False)
    tokens = windows(encode(documents(None), read_tokenizer(folder)).train, *ROUTED, "route")

    @cache  # the random configurations of both phases are the same
    def loss(widths: Widths) -> float:
        return evaluate(model, tokens, [widths], batch_size=len(tokens))[0]

    for phase, table in by_phase(load_tables(folder, model.elastic)).items():
        found = train_routers(model.elastic, table, loss, ROUTE, progress)
        chosen = []
        for report in found.targets:
            rung = found.ladder.within(table.predict, report.target * table.full_ms)
            chosen += [
                {"target": report.target, "by": "routed", **rung.to_dict()},
                {"target": report.target, "by": "search", **report.search_widths.to_dict()},
            ]
        smallest = table.smallest_ms / table.full_ms
        write_json(
            folder / f"{phase}.json",
            {"smallest": smallest, "surrogate": found.surrogate.to_dict(), "chosen": chosen},
        )


def chosen_in(folder: Path, phase: str) -> tuple[list[dict[str, Any]], list[Widths]]:
    rows = read_json(folder / f"{phase}.json")["chosen"]
    return rows, [Widths(row["mlp"], row["heads"]) for row in rows]


def measured(args: argparse.Namespace, folder: Path, name: str, progress: Any) -> None:
    """The latency of what was chosen, as a fraction of the full model's, timed in turn with it."""
    for phase, workload in WORKLOADS.items():
        file = folder / f"{phase}-measured.json"
        if not file.is_file():
            found = measure(from_pretrained(folder), chosen_in(folder, phase)[1], workload, rounds=3)
            full_ms = found.full.ms
            if found.noise.sentence:
                ui.tell(found.noise.sentence)
            write_json(file, {"full_ms": full_ms, "fractions": [ms / full_ms for ms, _ in found.others]})


def judge(args: argparse.Namespace, folder: Path, name: str, progress: Any) -> None:
    """The loss of what was chosen, on text that nothing was trained on."""
    if (folder / "judged.json").is_file():
        return
    model, tokenizer = from_pretrained(folder), read_tokenizer(folder)
    held_out = encode(([], documents(None)[1]), tokenizer)
    tokens = held_out_windows(tokenizer, held_out, JUDGED, LENGTH)
    every = {"full": [model.elastic.full()]} | {phase: chosen_in(folder, phase)[1] for phase in WORKLOADS}
    write_json(
        folder / "judged.json", {p: evaluate(model, tokens, own, batch_size=1) for p, own in every.items()}
    )


STAGES = {"train": train, "profile": profile, "route": route, "measure": measured, "judge": judge}


def table_of(out: Path) -> str:
    """Both models' losses, by phase and target, once they are there."""
    lines = ["| phase | target | chosen by | menus | measured fraction | loss | skipped: MLPs, attentions |"]
    lines.append("| --- | ---: | --- | --- | ---: | ---: | ---: |")
    rows = []
    for name in MENUS:
        folder = out / name.replace(" ", "-")
        losses = read_json(folder / "judged.json")
        lines.append(f"| full | 1 | | {name} | 1 | {losses['full'][0]:.3f} | 0, 0 |")
        for phase in WORKLOADS:
            chosen, widths = chosen_in(folder, phase)
            fractions = read_json(folder / f"{phase}-measured.json")["fractions"]
            for row, own, fraction, loss in zip(chosen, widths, fractions, losses[phase], strict=True):
                skipped = ", ".join(str(layers.count(0)) for layers in own.axes)
                cells = (
                    phase,
                    f"{row['target']:g}",
                    row["by"],
                    name,
                    f"{fraction:.3f}",
                    f"{loss:.3f}",
                    skipped,
                )
                rows.append((phase, row["target"], row["by"], f"| {' | '.join(cells)} |"))
    return "\n".join([*lines, *(what for *_, what in sorted(rows))])


if __name__ == "__main__":
    main()
