"""The study of rivals: criteria, budgets, and what a row says."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from nn.models import small_model
from scripts import load_script

from flextron.config import Widths
from flextron.conversion.importance import Importance
from flextron.corpus import Corpus
from flextron.nn import elastic_config, make_elastic
from flextron.recipes import RouteConfig, TrainConfig
from flextron.training import train
from flextron_lab.study.arithmetic import arithmetic_table
from flextron_lab.study.rows import ROWS

TEXT = torch.randint(1, 61, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def study():
    return load_script("studies/rivals.py")


@pytest.fixture(scope="module")
def model():
    return small_model().requires_grad_(False)


@pytest.fixture(scope="module")
def seen(study, model):
    return study.Statistics.of(model, TEXT)


@pytest.fixture(scope="module")
def case(study, model, seen, tmp_path_factory):
    case = study.Study(tmp_path_factory.mktemp("rivals"), "stories15m", 0, lambda *_: None)
    given = {
        "source": SimpleNamespace(model=model),
        "seen": seen,
        "calibration": TEXT,
        "judges": {"random": TEXT},
    }
    case.__dict__.update(given)
    return case


def test_statistics_are_those_of_what_the_last_projections_read(model, seen):
    kept = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: kept.append(args[0])
    )
    states = model.model(TEXT, output_hidden_states=True).hidden_states
    handle.remove()
    mean, variance, square = seen.neurons[1]
    x = kept[0].flatten(0, 1).double()
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(variance, x.var(0, unbiased=False))
    torch.testing.assert_close(square, x.square().mean(0))
    change = 1 - torch.cosine_similarity(states[1], states[2], dim=-1).mean()
    assert float(seen.influence[1]) == pytest.approx(float(change), abs=1e-6)


def test_a_constant_neuron_fluctuates_least_and_a_silent_one_weighs_least(study, model, seen):
    neurons = [(mean, variance.clone(), square.clone()) for mean, variance, square in seen.neurons]
    heaviest = int(model.model.layers[0].mlp.down_proj.weight.abs().sum(0).argmax())
    neurons[0][1][7] = 0.0
    neurons[0][2][heaviest] = 0.0
    changed = study.Statistics(neurons, seen.heads, seen.influence)
    assert int(study.flap(model, changed)[0][0].argmin()) == 7
    assert int(study.wanda(model, changed)[0][0].argmin()) == heaviest


def test_what_is_kept_is_within_the_budget_and_near_it(study, model, seen):
    config = elastic_config(
        model.config, "kv_group", tuple(range(1, 41)), tuple(range(1, model.config.num_key_value_heads + 1))
    )
    table = arithmetic_table(config, 16)
    neurons, heads = study.flap(model, seen)
    scored = Importance(tuple(neurons), tuple(heads), "FLAP", TEXT.numel())
    for budget in (0.8, 0.6):
        for widths in (study.by_threshold(config, table, scored, budget), study.alike(config, table, budget)):
            assert budget - 0.12 < table.fraction(widths) <= budget


def test_depth_goes_where_the_least_happens(study, model):
    config = elastic_config(model.config, "kv_group", (0, 40), (0, model.config.num_key_value_heads))
    table = arithmetic_table(config, 16)
    widths = study.by_depth(config, table, torch.tensor([0.5, 0.1, 0.3]), 0.7)
    assert widths.mlp == (40, 0, 40) and widths.heads[1] == 0
    assert study.by_depth(config, table, torch.tensor([0.5, 0.1, 0.3]), 1.0) == config.full()


def test_flaps_bias_is_what_the_pruned_neurons_give_in_the_mean(study, model, seen, case):
    pruned, widths = case._prune("FLAP", False, 0.7)
    n, source = widths.mlp[0], model.model.layers[0].mlp.down_proj
    assert n < 40
    order = torch.sort(study.flap(model, seen)[0][0], descending=True, stable=True).indices[n:]
    mean = seen.neurons[0][0][order].float()
    torch.testing.assert_close(pruned.model.layers[0].mlp.down_proj.bias, source.weight[:, order] @ mean)


def test_rows_are_appended_once(study, case):
    (row,) = case.do("Wanda", False, {False}, [0.7])
    assert not [*case.do("Wanda", False, {False}, [0.7])]
    assert [r["budget"] for r in study.rows_in(case.out)] == [0.7]
    assert row["fraction"] <= 0.7 and row["losses"]["random"]["loss"] > 0
    assert Widths(row["mlp"], row["heads"]).mlp == tuple(row["mlp"])


def test_a_fit_for_the_one_size_makes_up_for_layers_that_are_gone(study, case, model, seen, monkeypatch):
    # the first layer goes: behind the last one nothing is left to make up for it
    monkeypatch.setitem(case.__dict__, "seen", replace(seen, influence=torch.arange(2.0)))

    # what the fit is about; a model that knows nothing loses alike, whatever it computes
    def error(elastic, ids):
        return (elastic.model(ids)[0] - model.model(ids)[0]).square().mean((1, 2))

    monkeypatch.setattr(study, "sequence_losses", error)
    errors = [
        next(case.do("ShortGPT", again, {False}, [0.7]))["losses"]["random"]["loss"]
        for again in (False, True)
    ]
    assert errors[1] < 0.95 * errors[0], errors


def test_ours_serves_every_size_from_one_training(study, case, model, monkeypatch):
    monkeypatch.setattr(study, "load_elastic", lambda _: (make_elastic(small_model()), None))
    monkeypatch.setattr(study.Study, "_converted", lambda _: None)
    trained = []
    monkeypatch.setattr(
        study, "train_model", lambda *args, **options: trained.append(args[2]) or train(*args, **options)
    )
    plan = SimpleNamespace(
        targets=(0.7, 0.85),
        train=TrainConfig(steps=2, batch_size=2, length=16, eval_every=0),
        route=RouteConfig(targets=(0.7, 0.85, 1.0), evaluations=24, prefill=16, steps=8),
        route_samples=2,
        route_length=16,
        narrower=0.1,
        ridge=0.1,
    )
    case.__dict__.update(plan=plan, corpus=Corpus(TEXT.flatten(), TEXT.flatten()))
    case._run("ladder.json").parent.mkdir(exist_ok=True)
    first = next(case.do("ours", True, {True}, plan.targets))  # killed after this row
    rows = [first, *case.do("ours", True, {True}, plan.targets)]
    assert [row["budget"] for row in rows] == [0.7, 0.85, 1.0] and {row["tokens"] for row in rows} == {64}
    assert all(row["fraction"] <= row["budget"] for row in rows)
    assert [config.networks for config in trained] == [
        tuple(Widths(row["mlp"], row["heads"]) for row in rows[:2])
    ] * 2
    assert {config.full_probability for config in trained} == {0.3}
    ids = TEXT[:, :-1], TEXT[:, 1:]
    parents = torch.nn.functional.cross_entropy(model(ids[0]).logits.flatten(0, 1), ids[1].flatten())
    assert rows[2]["losses"]["random"]["loss"] != pytest.approx(float(parents), abs=1e-4)


def test_a_rival_trains_its_one_size_alone(study, case, monkeypatch):
    trained = []

    def train(_, name, model, run, **options):
        run.mkdir(parents=True)
        trained.append(options)
        return 7

    monkeypatch.setattr(study.Study, "_train", train)
    rows = [*case.do("FLAP", True, {False, True}, [0.7])]
    assert [(row["key"]["trained"], row["tokens"]) for row in rows] == [(False, 0), (True, 7)]
    assert trained == [{"networks": (Widths(rows[0]["mlp"], rows[0]["heads"]),), "full_probability": 0.0}]
    assert not [*case.do("FLAP", True, {False, True}, [0.7])]


def test_figures_are_written_row_by_row_and_shown_over_seeds(study, tmp_path, capsys):
    def row(seed, loss):
        key = {"parent": "stories15m", "arm": "FLAP", "refit": True, "trained": False, "seed": seed}
        losses = {"stories": {"loss": loss, "error": 0.1}}
        facts = {"name": "FLAP", "budget": 0.7, "fraction": 0.69, "params": 100, "tokens": 0}
        return json.dumps({"key": key, **facts, "losses": losses})

    (tmp_path / ROWS).write_text("\n".join([row(0, 2.0), row(1, 3.0)]) + "\n")
    study.write(tmp_path)
    study.show(tmp_path, "stories15m")
    assert "2.500 (0.707)" in capsys.readouterr().out
    header, first, _ = (tmp_path / "rivals.csv").read_text().splitlines()
    assert header == ",".join(study.COLUMNS)
    assert first == "stories15m,FLAP,1,0,0,0.7,0.69,100,stories,2.0,0.1"
