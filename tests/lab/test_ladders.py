"""The study of ladders: what is done already is not done again, and the table has means and spreads."""

from __future__ import annotations

import sys

import pytest
from scripts import load_script

from flextron import Mix
from flextron_lab.demo.run import plan_for
from flextron_lab.study.rows import ROWS, rows_in


@pytest.fixture(scope="module")
def study():
    return load_script("studies/ladders.py")


def call(study, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["ladders.py", *map(str, argv)])
    study.main()


def test_each_form_seed_and_change_is_run_once(study, tmp_path, monkeypatch, capsys):
    ran = []

    def run(args, base, corpus, key, progress):
        ran.append((key["form"], key["seed"], key["settings"]))
        losses = {"own": [3.0 + key["seed"], 2.5, 2.2, 2.1, 2.0, 1.9]}
        return {"parent": {"own": 1.85}, "fitted": losses, "trained": losses}

    monkeypatch.setattr(study, "_prepared", lambda *_: (tmp_path, None))
    monkeypatch.setattr(study, "_run", run)
    for seeds in ("0", "0,2"):
        call(study, monkeypatch, tmp_path, "--forms", "steps", "--seeds", seeds)
    call(study, monkeypatch, tmp_path, "--forms", "steps", "--seeds", "0", "--ridge", "0.01")
    assert ran == [("steps", 0, {}), ("steps", 2, {}), ("steps", 0, {"ridge": 0.01})]
    assert (tmp_path / ROWS).read_text().count("\n") == 3
    said = capsys.readouterr().out
    assert "| stories15m | steps |  | own | trained | 4.000 ± 1.414 | 2.500 ± 0.000 |" in said
    assert "| stories15m | steps | ridge 0.01 | own | fitted | 3.000 | 2.500 |" in said
    assert said.rstrip().endswith("| 1.850 |")


@pytest.fixture
def stages(study, tmp_path, monkeypatch):
    """The stages, which only note what they are asked for, and folders that are there."""
    done = []
    (tmp_path / "base-stories15m").mkdir()
    monkeypatch.setattr(study, "_prepared", lambda *_: (tmp_path / "base-stories15m", "text"))

    def stage(name):
        def run(folder, *config, data, **options):
            done.append((name, folder.name, config, data, options))

        return run

    for name in ("route", "refit", "train"):
        monkeypatch.setattr(study.pipeline, name, stage(name))

    class Checkpoint:
        """A checkpoint of a parent as large as SmolLM2."""

        def __enter__(self):
            self.origin = self.elastic = self
            return self

        def __exit__(self, *_):
            pass

        full, params = (lambda self: None), (lambda self, _: 100_000_000)

    monkeypatch.setattr(study.ElasticDirectory, "open", lambda _: Checkpoint())
    monkeypatch.setattr(study, "_losses", lambda *_: {"own": [len(done), 1.0]})
    return done


def test_what_was_chosen_is_fitted_and_trained_with_one_seed(study, tmp_path, monkeypatch, stages):
    call(study, monkeypatch, tmp_path, "--forms", "steps", "--seeds", "2")
    (_, _, (route,), text, _), (_, _, _, _, fit), (_, name, (training,), _, trained) = stages
    assert route.seed == training.seed == 2 and fit["ladder"] and trained["ladder"] and text == "text"
    plan = plan_for(100_000_000, 2)
    assert (fit["samples"], fit["ridge"]) == (plan.fitted, plan.ridge)
    assert (training.steps, training.learning_rate) == (plan.train.steps, plan.train.learning_rate)
    (row,) = rows_in(tmp_path)
    assert row["fitted"] == {"own": [2, 1.0]} and row["trained"] == {"own": [3, 1.0]}
    assert row["parent"] == {"own": 1.0} and not (tmp_path / name).exists()


def test_a_change_begins_at_the_same_routers_and_goes_into_its_stage(study, tmp_path, monkeypatch, stages):
    common = (tmp_path, "--forms", "steps", "--seeds", "0")
    call(study, monkeypatch, *common)
    changes = (
        "--narrower",
        "0.1",
        "--steps",
        "7",
        "--data",
        "own",
        "--data",
        "a.txt",
        "--weights",
        "1,3",
        "--keep",
    )
    call(study, monkeypatch, *common, *changes)
    assert [name for name, *_ in stages] == ["route", "refit", "train", "refit", "train"]
    (_, _, _, data, fit), (_, name, (training,), _, _) = stages[-2:]
    assert data == Mix(["text", "a.txt"], [1.0, 3.0])
    assert fit["narrower"] == 0.1 and training.steps == 7 and (tmp_path / name).is_dir()


def test_a_run_that_was_killed_while_it_trained_is_not_fitted_again(study, tmp_path, monkeypatch, stages):
    common = (tmp_path, "--forms", "steps", "--seeds", "0")
    train = study.pipeline.train
    monkeypatch.setattr(study.pipeline, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(study, monkeypatch, *common)
    monkeypatch.setattr(study.pipeline, "train", train)
    call(study, monkeypatch, *common)
    assert [name for name, *_ in stages] == ["route", "refit", "train"]
