"""The study of ladders: what is done already is not done again, and the table has means and spreads."""

from __future__ import annotations

import sys

import pytest
from scripts import load_script

from flextron_lab.demo.run import plan_for
from flextron_lab.study.rows import ROWS


@pytest.fixture(scope="module")
def study():
    return load_script("studies/ladders.py")


def test_each_form_and_seed_is_run_once(study, tmp_path, monkeypatch, capsys):
    ran = []

    def run(out, base, corpus, form, seed, progress):
        ran.append((form, seed))
        row = [3.0 + seed, 2.5, 2.2, 2.1, 2.0, 1.9]
        return {"form": form, "seed": seed, "parent": 1.85, "fitted": row, "trained": row}

    monkeypatch.setattr(study, "_prepared", lambda *_: (tmp_path, None))
    monkeypatch.setattr(study, "_run", run)
    for seeds in ("0", "0,2"):
        monkeypatch.setattr(sys, "argv", ["ladders.py", str(tmp_path), "--forms", "steps", "--seeds", seeds])
        study.main()
    assert ran == [("steps", 0), ("steps", 2)]
    assert (tmp_path / ROWS).read_text().count("\n") == 2
    said = capsys.readouterr().out
    assert "parent: 1.850" in said and "| steps | trained | 4.000 ± 1.414 | 2.500 ± 0.000 |" in said


def test_what_was_chosen_is_fitted_and_trained_with_one_seed(study, tmp_path, monkeypatch):
    done = []
    (tmp_path / "base").mkdir()

    def stage(name):
        def run(folder, *config, data, **options):
            assert folder == tmp_path / "run" and data == "text"
            done.append((name, options.get("ladder"), *(c.seed for c in config)))

        return run

    for name in ("route", "refit", "train"):
        monkeypatch.setattr(study.pipeline, name, stage(name))
    monkeypatch.setattr(study, "_plan", lambda _, seed: plan_for(100_000_000, seed))
    monkeypatch.setattr(study, "_losses", lambda *_: [len(done), 1.0])
    row = study._run(tmp_path, tmp_path / "base", "text", "steps", 2, None)
    assert done == [("route", None, 2), ("refit", True), ("train", True, 2)]
    assert row == {"form": "steps", "seed": 2, "parent": 1.0, "fitted": [2, 1.0], "trained": [3, 1.0]}
    assert not (tmp_path / "run").exists() and (tmp_path / "base").is_dir()
