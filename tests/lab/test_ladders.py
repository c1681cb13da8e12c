"""The study of ladders: what is done already is not done again, and the table has means and spreads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scripts import load_script


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
    assert (tmp_path / study.ROWS).read_text().count("\n") == 2
    said = capsys.readouterr().out
    assert "parent: 1.850" in said and "| steps | trained | 4.000 ± 1.414 | 2.500 ± 0.000 |" in said


def test_stages_of_the_demonstration_give_a_row(study, tmp_path, monkeypatch):
    from nn.models import small_model
    from test_cli import SENTENCE  # words enough for a tokenizer

    from flextron import pipeline
    from flextron.artefacts.latency_table import Workload
    from flextron.corpus import encode
    from flextron_lab.demo.parents import Parent
    from flextron_lab.demo.tiny import train_tokenizer

    tokenizer = train_tokenizer([SENTENCE] * 40)
    parent = Parent(small_model(vocab_size=len(tokenizer)), tokenizer, "tiny", "")
    corpus = encode(([SENTENCE] * 400, [SENTENCE] * 200), tokenizer)
    base = tmp_path / "base"
    pipeline.convert(parent.model, base, data=corpus, tokenizer=tokenizer, samples=2, length=32)
    pipeline.profile(base, [Workload.prefill(32)], rounds=1, patience=0.0)
    row = study._run(Path(tmp_path), base, corpus, "steps", 0, lambda *_: None)
    assert row["form"] == "steps" and len(row["fitted"]) == len(row["trained"]) == len(study.TARGETS) + 1
    assert not (tmp_path / "run").exists() and base.is_dir()
