"""The study of rivals: criteria, budgets, and what a row says."""

from types import SimpleNamespace

import pytest
import torch
from nn.models import small_model
from scripts import load_script

from flextron.config import Widths
from flextron.conversion.importance import Importance
from flextron.nn import elastic_config
from flextron_lab.study.arithmetic import arithmetic_table

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
    case = study.Study(tmp_path_factory.mktemp("rivals"), "stories15m", lambda *_: None)
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


def test_rows_are_appended_once(case):
    case.do("Wanda", False, False, 0, [0.7])
    case.do("Wanda", False, False, 0, [0.7])
    (row,) = case.rows()
    assert row["fraction"] <= 0.7 and row["losses"]["random"]["loss"] > 0
    assert Widths(row["mlp"], row["heads"]).mlp == tuple(row["mlp"])
