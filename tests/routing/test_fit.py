"""The fit of a latency table on paper: costs, base and slope, what they are judged by."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from synthetic import make_config, make_table, measured

from flextron.routing.fit import Timed, calibration_widths, fit_costs, fit_line, fit_table, random_widths

CONFIG = make_config()
TABLE = make_table(CONFIG)
ALIKE = [CONFIG.uniform(i, -1) for i in range(4)] + [CONFIG.uniform(-1, i) for i in range(3)]


def timed(noise: float, rounds: int = 1, seed: int = 0) -> list[Timed]:
    """Networks of the table's machine, the full one first, with times as ``rounds`` noisy samples give them."""
    rng, (some, _) = random.Random(seed), calibration_widths(CONFIG, 8, 6, seed=3)
    error = noise / rounds**0.5
    return [
        Timed(w, TABLE.predict(w) * (1 + (i > 0) * error * rng.gauss(0, 1)), error)
        for i, w in enumerate(some + ALIKE)
    ]


def test_costs_are_those_of_the_machine():
    costs, error = fit_costs(CONFIG, timed(0.0))
    for own, axis in zip(costs, TABLE.by_axis, strict=True):
        assert own == pytest.approx([TABLE.slope * (ms - axis[0][0]) for ms in axis[0]])
    assert error < 1e-4


def test_a_wider_choice_never_costs_less():
    slower = [t._replace(ms=1.3 * t.ms) if t.widths == ALIKE[1] else t for t in timed(0.0)]
    for seed in range(20):
        for times in (timed(0.3, seed=seed), slower):
            assert all(0 <= a <= b for own in fit_costs(CONFIG, times).costs for a, b in pairwise(own))


def test_the_error_says_how_far_two_profiles_are_apart():
    """And a profile of more rounds is nearer the truth."""
    said, found = [], []
    for rounds in (1, 16):
        off = []
        for seed in range(60):
            costs, error = fit_costs(CONFIG, times := timed(0.04, rounds, seed))
            table = replace(TABLE, base=0.0, slope=1.0, **{
                axis.name: (own,) * CONFIG.num_layers for axis, own in zip(CONFIG.axes, costs, strict=True)
            })  # fmt: skip
            table = fit_table(table, [(t.widths, t.ms) for t in times], [(t.widths, t.ms) for t in times])
            off.append(max(abs(table.fraction(t.widths) / TABLE.fraction(t.widths) - 1) for t in times))
        said.append(error)
        found.append(sorted(off)[30])
    assert said[0] == pytest.approx(4 * said[1], rel=0.1)
    assert all(error < worst < 3 * error for error, worst in zip(said, found, strict=True))


def test_fit_recovers_base_and_slope():
    sums = [10.0, 5.0, 7.0, 8.5]
    base, slope = fit_line(sums, [1.5 + 0.9 * s for s in sums], [3, 1, 1, 1])
    assert (base, slope) == pytest.approx((1.5, 0.9))


def test_fit_refuses_times_that_do_not_grow():
    with pytest.raises(ValueError, match="measured must grow with sums"):
        fit_line([1.0, 2.0], [5.0, 4.0], [1, 1])
    with pytest.raises(ValueError, match="sums must differ"):
        fit_line([1.0, 1.0], [5.0, 4.0], [1, 1])


def test_calibration_recovers_the_machine():
    table = fit_table(replace(TABLE, base=0.0, slope=1.0), *measured(TABLE, 0.0))
    assert (table.base, table.slope) == pytest.approx((5.0, 0.8))
    assert table.residual_worst == pytest.approx(0.0, abs=1e-9)


def test_residual_is_taken_on_configurations_that_were_not_fitted():
    table = fit_table(TABLE, *measured(TABLE, 0.05))
    assert {c.widths for c in table.fitted}.isdisjoint(c.widths for c in table.held_out)
    assert len(table.held_out) == 6
    errors = sorted(abs(c.predicted - c.measured) / c.measured for c in table.held_out)
    assert table.residual_median == pytest.approx((errors[2] + errors[3]) / 2)
    assert table.residual_worst == pytest.approx(errors[-1]) and errors[-1] > 0.01


def test_calibration_says_so_when_time_does_not_follow_the_table():
    to_fit, to_judge = measured(TABLE, 0.0)
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


def test_menus_without_a_choice_cannot_be_profiled():
    with pytest.raises(ValueError, match="at least three configurations"):
        calibration_widths(make_config(layers=2, mlp_choices=(64,), head_choices=(3,)), 4, 2, seed=0)
