"""The latency table on paper: prediction, gradient, files."""

import json
import random
from dataclasses import replace

import pytest
import torch
from routing.synthetic import make_config, make_table, measured

from flextron.artefacts.latency_table import LatencyTable, Workload, load_tables, save_tables
from flextron.checkpoint import CheckpointError
from flextron.config import Widths
from flextron.routing.fit import fit_table, random_widths
from flextron.routing.search import one_hot

CONFIG = make_config()
TABLE = make_table(CONFIG)


def test_prediction_is_base_plus_slope_times_the_layers():
    widths = Widths((16, *(64,) * 11), (1, *(3,) * 11))
    layers = (0.01 * 16 + 0.05) + 11 * (0.01 * 64 + 0.05) + (0.2 + 0.1) + 11 * (0.6 + 0.1)
    assert TABLE.predict(widths) == pytest.approx(2.0 + 1.1 * layers)
    assert TABLE.fraction(CONFIG.full()) == 1.0


def test_expectation_of_certain_choices_is_the_prediction():
    rng = random.Random(0)
    drawn = [random_widths(CONFIG, rng) for _ in range(20)]
    expected = TABLE.expected(*(p.double() for p in one_hot(CONFIG, drawn)))
    assert expected.tolist() == pytest.approx([TABLE.predict(w) for w in drawn])


def test_expectation_is_the_mean_over_draws():
    mlp = torch.tensor([0.5, 0.0, 0.5, 0.0]).repeat(12, 1)
    heads = torch.tensor([0.25, 0.75, 0.0]).repeat(12, 1)
    by_hand = 2.0 + 1.1 * 12 * (0.5 * 0.21 + 0.5 * 0.53 + 0.25 * 0.3 + 0.75 * 0.5)
    assert float(TABLE.expected(mlp, heads)) == pytest.approx(by_hand)


def test_expectation_has_the_right_gradient():
    mlp = torch.rand(2, 12, 4, dtype=torch.float64, requires_grad=True)
    heads = torch.rand(2, 12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(TABLE.expected, (mlp, heads))


def test_tables_survive_the_file(tmp_path):
    table = fit_table(TABLE, *measured(TABLE, 0.02))
    tables = {"prefill": table, "decode": make_table(CONFIG, "decode")}
    save_tables(tables, tmp_path)
    assert load_tables(tmp_path, CONFIG) == tables
    stored = json.loads((tmp_path / "latency.json").read_text())["tables"]["prefill"]
    assert stored["residual_median"] == table.residual_median


def test_a_directory_that_was_never_profiled_has_no_tables(tmp_path):
    assert load_tables(tmp_path, CONFIG) == {}


@pytest.mark.parametrize(
    "content",
    [
        '{"format": 1, "tables": {"prefill": {"elastic": {}}}}',
        '{"format": 1, "tables": {"prefill": 3}}',
        '{"format": 1}',
        '{"format": 2}',
        "[]",
    ],
)
def test_a_foreign_file_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "latency.json").write_text(content)
    with pytest.raises(ValueError, match=r"latency\.json"):
        load_tables(tmp_path, CONFIG)


def test_a_table_of_another_model_is_refused_and_says_whose(tmp_path):
    """The menus are the same: what differs is a size that no menu shows, and that a latency depends on."""
    save_tables({"prefill": TABLE}, tmp_path)
    wider = replace(CONFIG, hidden_size=64, vocab_size=120)
    with pytest.raises(CheckpointError) as caught:
        load_tables(tmp_path, wider)
    assert str(caught.value) == (
        f"{tmp_path}/latency.json: must be made for the model here, got one of hidden_size 32 instead of 64, "
        f"vocab_size 100 instead of 120; run `flextron profile {tmp_path}`"
    )


def test_a_table_of_an_unknown_model_is_left_out_and_named(tmp_path):
    """What versions wrote that did not say which model a table is of."""
    save_tables({"prefill": TABLE, "decode": make_table(CONFIG, "decode")}, tmp_path)
    path = tmp_path / "latency.json"
    content = json.loads(path.read_text())
    del content["tables"]["decode"]["elastic"]
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"latency\.json: a table does not say .* run `flextron profile"):
        assert load_tables(tmp_path, CONFIG) == {"prefill": TABLE}


def test_a_table_of_other_menus_is_refused():
    with pytest.raises(ValueError, match="run `flextron profile DIR` again"):
        TABLE.check(make_config(layers=3))
    TABLE.check(CONFIG)


def test_another_machine_is_named():
    assert TABLE.differs(TABLE.machine) == []
    assert "threads 2, now it is 8" in TABLE.differs({**TABLE.machine, "threads": 8})[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("prefill", 0, 8),
        ("prefill", 1, 0),
        ("prefill", 1, 8, 8),
        ("decode", 1, 2, 8),
        ("decode", 1, 1, 0),
    ],
)
def test_impossible_workloads_are_refused(arguments):
    with pytest.raises(ValueError, match="Workload: "):
        Workload(*arguments)


def test_table_from_another_version_names_the_field():
    values = TABLE.to_dict()
    del values["base"]
    with pytest.raises(ValueError, match="base must be there, got nothing"):
        LatencyTable.from_dict(values)
