"""The study of a disturbed machine, on a model of numbers: what its rows are made of, no promise about any time."""

import contextlib
import subprocess
from dataclasses import replace

import pytest
import torch
from nn.models import small_model
from routing.synthetic import make_table
from scripts import load_script

from flextron.artefacts.machine import machine_of
from flextron.artefacts.noise import Noise
from flextron.artefacts.planner import Planner
from flextron.judge.objectives import cross_entropy
from flextron.nn import make_elastic

TEXTS = torch.randint(1, 61, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def study():
    return load_script("studies/disturbed.py")


@pytest.fixture
def model():
    model = make_elastic(small_model())
    model.planner = Planner(model.elastic)
    return model


def test_every_arm_says_the_same_texts_and_tells_their_loss(study, model, monkeypatch):
    table = replace(make_table(model.elastic, "decode"), machine=machine_of(model))
    entered, said = [], {}
    tell = study._said
    monkeypatch.setattr(
        study, "_said", lambda model, text, prompt: said.setdefault(len(said), tell(model, text, prompt))
    )

    @contextlib.contextmanager
    def disturbance():
        entered.append(True)
        yield

    rows = study.deadlines(model, table, TEXTS, 6, 0.8, 0.7, disturbance, lambda *_: None)
    arms = ("full", "fixed", "held")
    assert [row[:2] for row in rows] == [[m, a] for m in ("as it is", "disturbed") for a in arms]
    assert entered == [True] and len(said) == 12
    model.set_widths(model.elastic.full())
    with torch.no_grad():
        exact = [cross_entropy(model(text[None]).logits[:, 5:], text[None, 5:]) for text in TEXTS]
    for i, loss in enumerate(exact):
        held, losses = said[3 * i]
        assert len(held.tokens) == len(losses) == 14
        assert sum(losses) / len(losses) == pytest.approx(float(loss), rel=1e-4)
    assert float(rows[0][-1]) == pytest.approx(sum(map(float, exact)) / 2, abs=1e-3)
    chosen = model.planner.resolve(0.8, phase="decode")
    assert {token.widths for token in said[1][0].tokens} == {chosen}


def test_a_profile_is_compared_with_the_whole_one(study, model, monkeypatch):
    tables = iter(
        replace(make_table(model.elastic, "decode", base=base), noise=Noise(taken, 0.0, 0.0), held_out=(), fitted=())
        for base, taken in ((2.0, 0.0), (2.0, 0.0), (4.0, 0.3))
    )  # fmt: skip
    asked = []
    monkeypatch.setattr(study, "profile", lambda *_, rounds, **__: asked.append(rounds) or next(tables))
    monkeypatch.setattr(study, "_disagreement", lambda one, other: abs(other.base - one.base))
    monkeypatch.setattr(type(make_table(model.elastic)), "residual_worst", 0.0)
    rows = study.profiles(model, None, 8, 0.0, contextlib.nullcontext, lambda *_: None)
    assert asked == [8, 4, 8]
    assert [row[0] for row in rows] == ["whole", "half", "disturbed"]
    assert [row[-1] for row in rows] == ["accepted", "accepted", "refused"]
    assert [row[3] for row in rows] == ["0.0%", "0.0%", "200.0%"] and rows[2][2] != "0.0%"


def test_what_takes_cores_is_gone_afterwards(study, monkeypatch):
    begun = []
    start = subprocess.Popen
    monkeypatch.setattr(study.subprocess, "Popen", lambda *a, **k: begun.append(start(*a, **k)) or begun[-1])
    with pytest.raises(KeyError), study.taken(2, 0.001, 0.5):
        assert len(begun) == 2 and all(process.poll() is None for process in begun)
        raise KeyError
    assert all(process.returncode is not None for process in begun)
