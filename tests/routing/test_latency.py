"""The latency table on paper: prediction, gradient, repair, fit, files."""

import json
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_config, make_table

from flextron.artefacts.latency_table import LatencyTable, Workload, load_tables, save_tables
from flextron.checkpoint import CheckpointError
from flextron.config import Widths
from flextron.routing.fit import calibration_widths, fit_line, fit_table, isotonic, random_widths
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


def test_repair_pools_what_falls():
    assert isotonic([1.0, 3.0, 2.0, 4.0]) == (1.0, 2.5, 2.5, 4.0)
    assert isotonic([3.0, 2.0, 1.0]) == (2.0, 2.0, 2.0)
    assert isotonic([1.0, 2.0]) == (1.0, 2.0)


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=12))
def test_repair_never_falls_keeps_the_sum_and_is_idempotent(values):
    repaired = isotonic(values)
    assert all(a <= b + 1e-9 for a, b in pairwise(repaired))
    assert sum(repaired) == pytest.approx(sum(values))
    assert isotonic(repaired) == pytest.approx(repaired)


def test_fit_recovers_base_and_slope():
    sums = [10.0, 5.0, 7.0, 8.5]
    base, slope = fit_line(sums, [1.5 + 0.9 * s for s in sums], [3, 1, 1, 1])
    assert (base, slope) == pytest.approx((1.5, 0.9))


def test_fit_refuses_times_that_do_not_grow():
    with pytest.raises(ValueError, match="measured must grow with sums"):
        fit_line([1.0, 2.0], [5.0, 4.0], [1, 1])
    with pytest.raises(ValueError, match="sums must differ"):
        fit_line([1.0, 1.0], [5.0, 4.0], [1, 1])


def _measured(fraction_noise: float, seed: int = 0) -> tuple[list, list]:
    """Times of a machine whose base is 5 and slope 0.8, instead of the draft's."""
    machine = replace(TABLE, base=5.0, slope=0.8)
    rng = random.Random(seed)
    to_fit, to_judge = calibration_widths(CONFIG, 10, 6, seed=3)
    noisy = [
        [(w, machine.predict(w) * (1 + fraction_noise * rng.gauss(0, 1))) for w in ws]
        for ws in (to_fit, to_judge)
    ]
    return noisy[0], noisy[1]


def test_calibration_recovers_the_machine():
    table = fit_table(replace(TABLE, base=0.0, slope=1.0), *_measured(0.0))
    assert (table.base, table.slope) == pytest.approx((5.0, 0.8))
    assert table.residual_worst == pytest.approx(0.0, abs=1e-9)


def test_residual_is_taken_on_configurations_that_were_not_fitted():
    table = fit_table(TABLE, *_measured(0.05))
    assert {c.widths for c in table.fitted}.isdisjoint(c.widths for c in table.held_out)
    assert len(table.held_out) == 6
    errors = sorted(abs(c.predicted - c.measured) / c.measured for c in table.held_out)
    assert table.residual_median == pytest.approx((errors[2] + errors[3]) / 2)
    assert table.residual_worst == pytest.approx(errors[-1]) and errors[-1] > 0.01


def test_calibration_says_so_when_time_does_not_follow_the_table():
    to_fit, to_judge = _measured(0.0)
    upside_down = [(w, 100.0 - ms) for w, ms in to_fit]
    table = fit_table(TABLE, upside_down, to_judge)
    assert any("does not follow" in warning for warning in table.warnings)
    assert table.full_ms == pytest.approx(upside_down[0][1])


def test_calibration_configurations_are_disjoint_and_hold_both_ends():
    to_fit, to_judge = calibration_widths(CONFIG, 8, 6, seed=0)
    assert to_fit[:2] == [CONFIG.full(), CONFIG.smallest()]
    assert len(set(to_fit)) == 8 and len(set(to_judge)) == 6
    assert set(to_fit).isdisjoint(to_judge)
    assert calibration_widths(CONFIG, 8, 6, seed=0) == (to_fit, to_judge)


def test_random_configurations_cover_the_range_of_sizes():
    rng = random.Random(0)
    fractions = sorted(TABLE.fraction(random_widths(CONFIG, rng)) for _ in range(400))
    low, high = TABLE.smallest_ms / TABLE.full_ms, 1.0
    fifths = [
        sum(low + (high - low) * i / 5 <= f <= low + (high - low) * (i + 1) / 5 for f in fractions)
        for i in range(5)
    ]
    assert min(fifths) > 25  # of 80, were they even


def test_tables_survive_the_file(tmp_path):
    table = fit_table(TABLE, *_measured(0.02))
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


def test_menus_without_a_choice_cannot_be_profiled():
    with pytest.raises(ValueError, match="at least three configurations"):
        calibration_widths(make_config(layers=2, mlp_choices=(64,), head_choices=(3,)), 4, 2, seed=0)


def test_table_from_another_version_names_the_field():
    values = TABLE.to_dict()
    del values["base"]
    with pytest.raises(ValueError, match="base must be there, got nothing"):
        LatencyTable.from_dict(values)
