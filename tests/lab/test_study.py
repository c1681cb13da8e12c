"""The study: a tiny one runs, stops, goes on, and says in its files what it ran."""

import csv
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flextron import pipeline
from flextron.artefacts.latency_table import Workload
from flextron.cli import main
from flextron.recipes import AdaptiveConfig, RouteConfig
from flextron_lab.demo import stories
from flextron_lab.demo.parents import load_parent
from flextron_lab.study import results, run, texts
from flextron_lab.study.plan import PLANS, Arm

TINY = replace(
    PLANS["stories260k"],
    workload=Workload.prefill(16),
    budgets=(0.9,),
    alone=(0.9,),
    train=replace(PLANS["stories260k"].train, steps=1, batch_size=2, length=16),
    route=RouteConfig(targets=(0.9, 1.0), evaluations=16, prefill=12, steps=4),
    end_to_end={"form": "gumbel", "steps": 2, "batch": 2},
    adaptive=AdaptiveConfig(targets=(0.9, 1.0), steps=2, batch=2, calibration=2, judged=2, prefill=12),
    adaptive_length=16,
    route_samples=1,
    length=16,
    judged=2,
    calibration=4,
)


def silent(what, done, total):
    """Progress that nobody watches."""


def row(arm, loss, seed=0, budget=0.5, tokens=10, widths=((8, 8), (1, 1))):
    return {
        "arm": arm, "seed": seed, "budget": budget, "tokens": tokens, "loss": loss, "predicted_ms": 5.0,
        "params": 100, "mlp": list(widths[0]), "heads": list(widths[1]),
    }  # fmt: skip


class Recorded:
    """A study that has been run elsewhere."""

    def __init__(self, *jobs):
        self.plan = PLANS["stories260k"]
        self._done = {f"{i}": {"rows": rows} for i, rows in enumerate(jobs)}

    def done(self):
        timed = [{"timed": {"mlp": [8, 8], "heads": [1, 1]}, "measured_ms": 4.0, "full_ms": 8.0}]
        return self._done | {"latency of 1 and 0": {"rows": timed}}


def test_every_arm_differs_from_the_main_one_in_one_thing():
    arms = PLANS["stories260k"].arms()
    assert arms.pop("importance order") == Arm()
    for name, arm in arms.items():
        changed = [f for f in ("order", "options", "alone") if getattr(arm, f) != getattr(Arm(), f)]
        assert len(changed) == 1, name
    names = {arm for _, shown in results.COMPARISONS.values() for arm, _ in shown.values()}
    routed = {"static routers", "end to end", "searched", *run.ADAPTIVE.values()}
    assert names <= {*PLANS["stories260k"].arms(), *routed}


def test_a_run_is_in_each_comparison_that_it_is_an_arm_of():
    study = Recorded([row("importance order", 2.0), row("importance order", 2.5, tokens=0)])
    found = {(r["comparison"], r["arm"]): r for r in results.rows_of(study)}
    assert set(found) == {
        ("a", "importance"), ("a", "importance, untrained"), ("b", "elastic, distillation"), ("b", "none"),
        ("c", "elastic"), ("d", "uniform"), ("g", "distillation"),
    }  # fmt: skip
    assert found["a", "importance"]["loss"] == 2.0 and found["b", "none"]["loss"] == 2.5
    assert all(r["measured_ms"] == 4.0 and r["full_ms"] == 8.0 for r in found.values())


def test_means_and_spreads_are_over_seeds():
    study = Recorded([row("cross-entropy", 2.0), row("cross-entropy", 3.0, seed=1)])
    (found,) = [s for s in results.summary(results.rows_of(study)) if s["arm"] == "cross-entropy"]
    assert (found["seeds"], found["loss"], found["of_full"]) == (2, 2.5, 0.5)
    assert found["spread"] == pytest.approx(0.5**0.5)


def test_the_kept_results_make_the_kept_summary_and_a_page_of_every_comparison(tmp_path, capsys):
    kept = Path(__file__).resolve().parents[2] / "python" / "studies"
    assert main(["reproduce", "--results", str(kept / "results.csv"), "--out", str(tmp_path), "--json"]) == 0
    written = {Path(path).name: Path(path) for path in json.loads(capsys.readouterr().out)["files"]}
    assert list(written) == ["results.csv", "summary.csv", "study.html"]
    assert written["results.csv"].read_bytes() == (kept / "results.csv").read_bytes()
    made, wanted = (
        list(csv.DictReader(f.read_text().splitlines()))
        for f in (written["summary.csv"], kept / "summary.csv")
    )
    assert len(made) == len(wanted) > 100
    for row, other in zip(made, wanted, strict=True):
        for column in other:
            assert row[column] == other[column] or float(row[column]) == pytest.approx(
                float(other[column]), rel=1e-4, abs=1e-5
            )
    page = written["study.html"].read_text(encoding="utf-8")
    parents = {row["parent"] for row in wanted}
    assert page.count("<h2>") == page.count("<svg") == len({(r["parent"], r["comparison"]) for r in wanted})
    assert len(parents) == 2 and all(f"<h2>{parent} (a): " in page for parent in parents)


def test_results_with_other_columns_are_refused(tmp_path, capsys):
    (tmp_path / "results.csv").write_text("parent,loss\nstories260k,2.0\n")
    assert (
        main(["reproduce", "--results", str(tmp_path / "results.csv"), "--out", str(tmp_path / "out")]) == 2
    )
    assert "results.csv: the columns must be parent, comparison, " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


needs_stories = pytest.mark.skipif(
    stories.find() is None or not (stories.data_folder() / "text" / texts.STORIES).is_file(),
    reason="stories260K and its text are not here; set FLEXTRON_DATA",
)


@needs_stories
def test_the_text_is_what_the_parent_was_trained_on(tmp_path):
    tokenizer = load_parent("stories260k").tokenizer
    corpus = run.Study("stories260k", tmp_path, (0,), silent).corpus(tokenizer)
    held_out = tokenizer.decode(corpus.held_out).split(tokenizer.bos_token)
    assert held_out[0] == "" and len(held_out) > 20  # nothing before the first story
    assert not any("\n\n" in story or tokenizer.eos_token in story for story in held_out)


@needs_stories
def test_a_study_stops_goes_on_and_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setitem(PLANS, "stories260k", TINY)
    measured = pipeline.profile_model

    def steady(*args, **kwargs):
        """What a quiet machine would measure, for a model that is not tiny."""
        table = measured(*args, **(kwargs | {"patience": 0}))
        layers = range(table.num_layers)
        mlp, heads = (
            tuple(tuple(map(float, menu)) for _ in layers)
            for menu in (table.elastic.mlp_choices, table.elastic.head_choices)
        )
        return replace(table, mlp=mlp, heads=heads, base=10.0, slope=1.0)

    monkeypatch.setattr(pipeline, "profile_model", steady)
    timed = pipeline.measure_adaptive
    monkeypatch.setattr(
        pipeline, "measure_adaptive", lambda *a, **k: replace(timed(*a, **k), adaptive=(12.0, 1.0))
    )
    study = run.Study("stories260k", tmp_path / "stories260k", (0,), silent)
    assert not study.run(deadline=time.monotonic())  # not even begun
    assert not study.done()
    with pytest.raises(ValueError, match="stages must include prepare and profile"):
        study.run(("prepare", "train"))
    assert set(study.done()) == {"convert"}
    assert study.run()
    lines = (tmp_path / "stories260k" / run.RUNS).read_text()
    assert run.Study("stories260k", tmp_path / "stories260k", (0,), silent).run()  # all of it is there
    assert (tmp_path / "stories260k" / run.RUNS).read_text() == lines

    written = results.write(results.rows_of(study), tmp_path)
    assert [path.name for path in written] == ["results.csv", "summary.csv", "study.html"]
    with written[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == results.COLUMNS
    assert {r["comparison"] for r in rows} == set(results.COMPARISONS)
    assert all(float(r["measured_ms"]) > 0 and float(r["loss"]) > 0 for r in rows)
    trained = [r for r in rows if r["arm"] not in ("none", "none, untrained", "random, untrained")]
    assert {r["tokens"] for r in trained if "untrained" not in r["arm"] and r["comparison"] != "b"} == {"32"}
    routers = [r for r in rows if r["comparison"] in "ef"]
    assert {r["arm"] for r in routers} == {
        "static", "input-adaptive", "input-adaptive by surrogate", "surrogate", "end to end",
    }  # fmt: skip
    assert all(float(r["router_seconds"]) > 0 for r in routers)
    kept = json.loads((tmp_path / "stories260k" / "trained-0" / "routers.json").read_text())
    assert kept["config"]["form"] == "surrogate"  # what is timed and served is not the other arm's
    assert "<svg" in written[2].read_text(encoding="utf-8")
