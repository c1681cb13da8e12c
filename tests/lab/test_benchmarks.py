"""The study of benchmarks: every network is asked the same questions once, and compared with its parent in pairs."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from scripts import load_script


@pytest.fixture
def study(monkeypatch):
    """The study with networks that answer by their budget."""
    study = load_script("studies/benchmarks.py")
    answers = {"parent": [1, 1, 0, 1], 1.0: [1, 1, 0, 1], 0.7: [1, 0, 0, 1]}
    elastic = SimpleNamespace(dial=None)

    @contextlib.contextmanager
    def budget(share):
        elastic.dial = share
        yield

    elastic.budget = budget
    asked = []

    def score(model, tokenizer, loaded):
        dial = getattr(model, "dial", "parent")
        asked.append((dial, *loaded))
        return {"acc": [float(a) for a in answers[dial]]}

    monkeypatch.setattr(
        study, "load_parent", lambda *_, **__: SimpleNamespace(model=torch.zeros(1), tokenizer="own")
    )
    monkeypatch.setattr(study, "make_elastic", lambda _: "stock")
    monkeypatch.setattr(study, "from_pretrained", lambda *_, **__: elastic)
    monkeypatch.setattr(study, "read_tokenizer", lambda _: "own")
    monkeypatch.setattr(study.Origin, "read", lambda path: SimpleNamespace(weights=str(path)))
    monkeypatch.setattr(study.tasks, "check", lambda *_: None)
    monkeypatch.setattr(study.tasks, "load", lambda name, _, questions: [f"{questions} of {name}"])
    monkeypatch.setattr(study.tasks, "score", score)
    study.asked = asked
    return study


def run(study, monkeypatch, out, *options):
    own = ["benchmarks.py", str(out), "--tasks", "piqa", "--budgets", "1,0.7", "--questions", "4", *options]
    monkeypatch.setattr("sys.argv", own)
    study.main()


def test_each_network_is_asked_once_and_beside_its_parent(study, monkeypatch, tmp_path, capsys):
    run(study, monkeypatch, tmp_path, "--checkpoint", "a", "--minutes", "0")
    assert study.asked == [("parent", "4 of piqa")]  # no time for more
    for _ in range(2):
        run(study, monkeypatch, tmp_path, "--checkpoint", "a")
    assert study.asked == [("parent", "4 of piqa"), (1.0, "4 of piqa"), (0.7, "4 of piqa")]
    shown = capsys.readouterr().out
    assert "0.750 (0.250)" in shown and "+0.000 (0.000)" in shown and "-0.250 (0.250)" in shown


def test_another_checkpoint_is_asked_anew_and_shown_alone(study, monkeypatch, tmp_path, capsys):
    for checkpoint in ("a", "b"):
        run(study, monkeypatch, tmp_path, "--checkpoint", checkpoint)
    assert [dial for dial, _ in study.asked] == ["parent", 1.0, 0.7, 1.0, 0.7]
    assert capsys.readouterr().out.count("-0.250") == 2
