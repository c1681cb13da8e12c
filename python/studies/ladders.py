"""Which ladder a few thousand tokens make the most of, and how they are fitted and trained on.

A parent is converted and profiled once, and routed once for each form of ``flextron route`` and each seed. Its networks
are fitted (``refit --ladder``) and trained (``train --ladder``) with the demonstration's settings, or with others, and
each target's network is judged on held-out text, of three kinds where the parent knows them, after the fit and after
the training. A line is kept for each; what a folder has is not done again, and a training that was killed goes on:

    python python/studies/ladders.py study/ladders
    python python/studies/ladders.py study/ladders --forms steps --seeds 0 --parent smollm2
    python python/studies/ladders.py study/ladders --forms steps --seeds 0 --parent smollm2 --learning-rate 4e-4
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flextron import Mix, pipeline, ui
from flextron.artefacts.directory import ElasticDirectory
from flextron.artefacts.latency_table import Workload
from flextron.checkpoint.hf import read_tokenizer
from flextron.checkpoint.io import read_json, write_json
from flextron.corpus import Corpus, Data, documents, encode, windows
from flextron.data import split_documents
from flextron.inference import from_pretrained
from flextron.judge.loss import evaluate
from flextron.recipes import ROUTE_FORMS, RouteConfig
from flextron_lab.demo.parents import load_parent
from flextron_lab.demo.run import Plan, plan_for
from flextron_lab.study import texts
from flextron_lab.study.rows import append_row, rows_in

TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9)
LENGTH = 256  # tokens of a sequence
JUDGED = {"stories15m": 12, "smollm2": 8}  # held-out sequences of each text
OWN = "own"  # the text that a parent is trained on, where no other is named
Row = dict[str, Any]


def main() -> None:
    args = _parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ui.reporter() as progress:
        base, corpus = _prepared(args, progress)
        for form in args.forms.split(","):
            for seed in map(int, args.seeds.split(",")):
                key = {"parent": args.parent, "form": form, "seed": seed, "settings": settings(args)}
                if key not in [row["key"] for row in rows_in(args.out)]:
                    append_row(args.out, {"key": key, **_run(args, base, corpus, key, progress)})
    print(table_of(rows_in(args.out)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the study")
    parser.add_argument("--parent", choices=tuple(JUDGED), default="stories15m")
    parser.add_argument("--forms", default="surrogate,steps", help=f"of {', '.join(ROUTE_FORMS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--keep", action="store_true", help="keep each trained checkpoint in the folder")
    changes = parser.add_argument_group("what is done otherwise than in the demonstration")
    for name in ("--narrower", "--ridge", "--learning-rate", "--full-probability"):
        changes.add_argument(name, type=float)
    changes.add_argument("--fitted", type=int, help="sequences that are fitted to")
    for name in ("--steps", "--batch-size", "--length"):
        changes.add_argument(name, type=int, help="of the training")
    changes.add_argument(
        "--data", action="append", help=f"text to fit and train on, or {OWN}; several: a mixture"
    )
    changes.add_argument("--weights", type=lambda s: [float(w) for w in s.split(",")], help="their shares")
    return parser


FITTED = ("narrower", "ridge", "fitted")
TRAINED = ("learning_rate", "full_probability", "steps", "batch_size", "length")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for beside the demonstration's way."""
    found = {name: getattr(args, name) for name in (*FITTED, *TRAINED, "data", "weights")}
    return {name: value for name, value in found.items() if value is not None}


def _prepared(args: argparse.Namespace, progress: Any) -> tuple[Path, Corpus]:
    """The parent, converted and profiled, and its text: stories of their own kind, or Python's documentation."""
    base = args.out / f"base-{args.parent}"
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


def _routed(
    args: argparse.Namespace, base: Path, corpus: Corpus, form: str, seed: int, progress: Any
) -> Path:
    """The converted parent with routers of this form and seed, which all settings start from."""
    folder = args.out / f"routed-{args.parent}-{form}-{seed}"
    if not folder.exists():
        new = args.out / "new"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(base, new)
        config = RouteConfig(
            form=form, targets=(*TARGETS, 1.0), evaluations=215, prefill=150, steps=800, seed=seed
        )
        pipeline.route(new, config, data=corpus, samples=2, length=LENGTH, progress=progress)
        new.rename(folder)
    return folder


def _run(args: argparse.Namespace, base: Path, corpus: Corpus, key: Row, progress: Any) -> Row:
    """Fit and train the networks of one form and seed; the losses of each target's, and the full one's."""
    routed = _routed(args, base, corpus, key["form"], key["seed"], progress)
    changes = key["settings"]
    name = "-".join(map(str, (args.parent, key["form"], key["seed"], *_words(changes)))).replace(" ", "_")
    folder, fit = args.out / name, args.out / f"{name}.json"
    plan, data = _plan(routed, key["seed"], changes), _text(changes, corpus)
    if not fit.exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(routed, folder)
        pipeline.refit(
            folder,
            data=data,
            samples=plan.fitted,
            length=LENGTH,
            narrower=plan.narrower,
            ridge=plan.ridge,
            ladder=True,
            validation_windows=2,
            progress=progress,
        )
        write_json(
            fit,
            {"parent": _losses(routed, corpus, args.parent), "fitted": _losses(folder, corpus, args.parent)},
        )
    pipeline.train(folder, plan.train, data=data, ladder=True, progress=progress)
    trained = _losses(folder, corpus, args.parent)
    row = read_json(fit)
    shutil.rmtree(folder / pipeline.TRAINING_FOLDER if args.keep else folder, ignore_errors=True)
    fit.unlink()
    parent = {text: losses[-1] for text, losses in row["parent"].items()}
    return {"parent": parent, "fitted": row["fitted"], "trained": trained}


def _words(changes: dict[str, Any]) -> Iterator[str]:
    """What names these changes in a table, and in a folder's name."""
    for name, value in changes.items():
        for one in value if isinstance(value, list) else [value]:
            yield f"{name} {Path(str(one)).name}"


def _plan(folder: Path, seed: int, changes: dict[str, Any]) -> Plan:
    """The demonstration's, for a parent of this size, with these changes."""
    with ElasticDirectory.open(folder) as checkpoint:
        elastic = checkpoint.origin.elastic
    plan = plan_for(elastic.params(elastic.full()), seed)
    training = replace(plan.train, checkpoint_every=50, **{n: changes[n] for n in TRAINED if n in changes})
    return replace(plan, train=training, **{n: changes[n] for n in FITTED if n in changes})


def _text(changes: dict[str, Any], corpus: Corpus) -> Data:
    found: list[Data] = [corpus if one == OWN else one for one in changes.get("data", [OWN])]
    return found[0] if len(found) == 1 else Mix(found, changes.get("weights"))


def _losses(folder: Path, corpus: Corpus, parent: str) -> dict[str, list[float]]:
    """Of the network that the routers choose at each target, and of the full one, nats per held-out token of a text."""
    model, tokenizer = from_pretrained(folder), read_tokenizer(folder)
    with ElasticDirectory.open(folder) as checkpoint:
        (table,) = checkpoint.tables
    limits = [target * table.full_ms for target in TARGETS]
    networks = [model.planner.ladder.within(table.predict, limit) for limit in limits]
    judges = {OWN: corpus.held_out}
    if parent == "smollm2":
        room = 4 * JUDGED[parent] * LENGTH
        judges |= {name: texts.judge(name, tokenizer, room) for name in ("openstax", "wikitext2")}
    return {
        name: evaluate(model, windows(stream, JUDGED[parent], LENGTH), [*networks, model.elastic.full()])
        for name, stream in judges.items()
    }


def table_of(rows: list[Row]) -> str:
    """Means over seeds, with their standard deviation where there are several."""
    networks = " | ".join(f"{t:g}" for t in TARGETS)
    lines = [
        f"| parent | form | settings | judged on | after | {networks} | full | the parent's |",
        "| --- | --- | --- | --- | --- |" + " ---: |" * (len(TARGETS) + 2),
    ]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = row["key"]
        said = ", ".join(_words(key["settings"]))
        groups.setdefault((key["parent"], key["form"], said), []).append(row)
    for names, own in groups.items():
        for text in own[0]["parent"]:
            for stage in ("fitted", "trained"):
                losses = [[*row[stage][text], row["parent"][text]] for row in own]
                cells = [_spread(column) for column in zip(*losses, strict=True)]
                lines.append("| " + " | ".join((*names, text, stage, *cells)) + " |")
    return "\n".join(lines)


def _spread(losses: tuple[float, ...]) -> str:
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.3f}{spread}"


if __name__ == "__main__":
    main()
