"""Which ladder a few thousand tokens make the most of: the demonstration's stages, by how the static routers learn.

A parent is converted and profiled once. For each form of ``flextron route`` and each seed its networks are chosen,
fitted (``refit --ladder``) and trained (``train --ladder``) on the same text, and each target's network is judged on
held-out text after the fit and after the training. A line is kept for each; what a folder has is not done again:

    python python/studies/ladders.py study/ladders
    python python/studies/ladders.py study/ladders --forms steps --seeds 0 --parent smollm2
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

from flextron import pipeline, ui
from flextron.artefacts.directory import ElasticDirectory
from flextron.artefacts.latency_table import Workload
from flextron.checkpoint.hf import read_tokenizer
from flextron.corpus import Corpus, documents, encode, windows
from flextron.data import split_documents
from flextron.inference import from_pretrained
from flextron.judge.loss import evaluate
from flextron.recipes import ROUTE_FORMS, RouteConfig
from flextron_lab.demo.parents import load_parent
from flextron_lab.demo.run import Plan, plan_for
from flextron_lab.study import texts
from flextron_lab.study.rows import append_row, rows_in

TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9)
LENGTH, JUDGED = 256, 12  # tokens of a sequence, and held-out sequences


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the study")
    parser.add_argument("--parent", default="stories15m", help="as flextron demo takes it")
    parser.add_argument("--forms", default="surrogate,steps", help=f"of {', '.join(ROUTE_FORMS)}")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ui.reporter() as progress:
        base, corpus = _prepared(args, progress)
        for form in args.forms.split(","):
            for seed in map(int, args.seeds.split(",")):
                if (form, seed) not in {(row["form"], row["seed"]) for row in rows_in(args.out)}:
                    row = _run(args.out, base, corpus, form, seed, progress)
                    append_row(args.out, row)
    print(table_of(rows_in(args.out)))


def _prepared(args: argparse.Namespace, progress: Any) -> tuple[Path, Corpus]:
    """The parent, converted and profiled, and its text: stories of their own kind, or Python's documentation."""
    base = args.out / "base"
    stories = args.parent == "stories15m"
    parts = split_documents(texts.tiny_stories()) if stories else documents(None)

    def tokens(tokenizer: Any) -> Corpus:
        return (
            Corpus(*(texts.story_tokens(p, tokenizer) for p in parts))
            if stories
            else encode(parts, tokenizer)
        )

    if not base.exists():
        parent = load_parent(args.parent, progress=progress, documents=parts[0])
        new = args.out / "new"
        shutil.rmtree(new, ignore_errors=True)
        corpus = tokens(parent.tokenizer)
        options = {"samples": 12, "length": LENGTH, "progress": progress}
        pipeline.convert(parent.model, new, data=corpus, tokenizer=parent.tokenizer, **options)
        pipeline.profile(new, [Workload.prefill(LENGTH)], progress=progress)
        new.rename(base)
    return base, tokens(read_tokenizer(base))


def _run(out: Path, base: Path, corpus: Corpus, form: str, seed: int, progress: Any) -> dict[str, Any]:
    """Choose, fit and train the networks of one form and seed; the losses of each target's, and the full one's."""
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    config = RouteConfig(
        form=form, targets=(*TARGETS, 1.0), evaluations=215, prefill=150, steps=800, seed=seed
    )
    pipeline.route(folder, config, data=corpus, samples=2, length=LENGTH, progress=progress)
    row: dict[str, Any] = {"form": form, "seed": seed, "parent": _losses(folder, corpus)[-1]}
    plan = _plan(folder, seed)
    fit = {"samples": plan.fitted, "length": LENGTH, "narrower": plan.narrower, "ridge": plan.ridge}
    pipeline.refit(folder, data=corpus, ladder=True, validation_windows=2, progress=progress, **fit)
    row["fitted"] = _losses(folder, corpus)
    pipeline.train(folder, plan.train, data=corpus, ladder=True, progress=progress)
    row["trained"] = _losses(folder, corpus)
    shutil.rmtree(folder)
    return row


def _plan(folder: Path, seed: int) -> Plan:
    """The demonstration's, for a parent of this size."""
    with ElasticDirectory.open(folder) as checkpoint:
        elastic = checkpoint.origin.elastic
    return plan_for(elastic.params(elastic.full()), seed)


def _losses(folder: Path, corpus: Corpus) -> list[float]:
    """Of the network that the routers choose at each target, and of the full one, nats per held-out token."""
    model = from_pretrained(folder)
    with ElasticDirectory.open(folder) as checkpoint:
        (table,) = checkpoint.tables
    limits = [target * table.full_ms for target in TARGETS]
    networks = [model.planner.ladder.within(table.predict, limit) for limit in limits]
    return evaluate(model, windows(corpus.held_out, JUDGED, LENGTH), [*networks, model.elastic.full()])


def table_of(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with their standard deviation where there are several."""
    lines = [
        f"parent: {rows[0]['parent']:.3f}",
        "",
        "| form | after | " + " | ".join(f"{t:g}" for t in TARGETS) + " | full |",
    ]
    lines.append("| --- | --- |" + " ---: |" * (len(TARGETS) + 1))
    for form in dict.fromkeys(row["form"] for row in rows):
        for stage in ("fitted", "trained"):
            cells = []
            for losses in zip(*(row[stage] for row in rows if row["form"] == form), strict=True):
                spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
                cells.append(f"{statistics.fmean(losses):.3f}{spread}")
            lines.append(f"| {form} | {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
