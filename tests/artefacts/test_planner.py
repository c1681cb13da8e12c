"""Budgets in the user's units: exact, monotone, and one sentence when impossible."""

import re
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
from routing.synthetic import make_config, make_origin, make_table, planner_in

from flextron.artefacts.ladder import Ladder, uniform_ladder
from flextron.artefacts.latency_files import save_tables
from flextron.artefacts.noise import Noise
from flextron.artefacts.planner import Planner
from flextron.config import Widths

CONFIG = make_config()
TABLES = (make_table(CONFIG), make_table(CONFIG, "decode", base=0.5))
PREFILL, DECODE = TABLES
PLANNER = Planner(CONFIG, TABLES)


def test_fraction_is_of_the_full_latency():
    widths = PLANNER.resolve(0.7)
    assert 0.68 < PLANNER.predict(widths) / PLANNER.predict(CONFIG.full()) <= 0.7
    assert PLANNER.resolve(1.0) == CONFIG.full()


def test_phases_have_their_own_tables():
    assert PLANNER.resolve(0.5, phase="decode") != PLANNER.resolve(0.5)
    assert PLANNER.resolve(0.5, phase="decode") == Planner(
        CONFIG, [replace(DECODE, workload=PREFILL.workload)]
    ).resolve(0.5)


def test_milliseconds_and_rates_say_the_same():
    widths = PLANNER.resolve(latency_ms=20.0)
    assert PLANNER.predict(widths) <= 20.0
    assert PLANNER.resolve(tokens_per_s=128 / 0.020) == widths  # the prefill workload has 128 tokens
    assert PLANNER.resolve(fraction=20.0 / PREFILL.full_ms) == widths


def test_milliseconds_of_a_doubtful_table_warn_and_shares_do_not():
    noisy = Planner(CONFIG, [replace(PREFILL, noise=Noise(taken=0.4, drift=0.0, spread=0.0))])
    with pytest.warns(
        UserWarning, match="must be within 10%, got one that was measured while other programs"
    ):
        assert noisy.resolve(latency_ms=20.0) == PLANNER.resolve(latency_ms=20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noisy.resolve(0.7)
        PLANNER.resolve(latency_ms=20.0)


def test_rungs_have_the_times_of_the_table():
    rungs = PLANNER.rungs("decode")
    assert [widths for widths, _ in rungs] == list(PLANNER.ladder.rungs)
    assert all(ms == DECODE.predict(widths) for widths, ms in rungs)
    with pytest.raises(ValueError, match=r"must predict times above 0, got -\d"):
        Planner(CONFIG, [replace(DECODE, base=-20.0)]).rungs("decode")


def test_parameters_and_memory_need_no_table():
    planner = Planner(CONFIG)
    target = (CONFIG.params(CONFIG.full()) + CONFIG.params(CONFIG.smallest())) // 2
    widths = planner.resolve(params=target)
    assert 0.95 * target < CONFIG.params(widths) <= target
    gigabytes = CONFIG.memory_bytes(widths, batch=2, context=100, bytes_per_value=2) / 1e9
    kwargs = {"batch": 2, "context": 100, "bytes_per_value": 2}
    assert planner.resolve(memory_gb=gigabytes, **kwargs) == widths
    assert planner.resolve(memory_gb=gigabytes) != widths  # other bytes, no cache


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fraction", [0.45 + 0.01 * i for i in range(56)]),
        ("latency_ms", [8 + 0.2 * i for i in range(70)]),
        ("params", [20_000 + 1_000 * i for i in range(120)]),
        ("memory_gb", [1e-4 + 5e-6 * i for i in range(120)]),
    ],
)
def test_more_budget_never_gives_a_smaller_network(name, values):
    chosen = []
    for value in values:
        try:
            chosen.append(PLANNER.resolve(**{name: value}))
        except ValueError:
            assert not chosen  # impossible below some value, possible above it
    assert all(b.covers(a) for a, b in pairwise(chosen))
    assert len(set(chosen)) > 20
    assert chosen[-1] == CONFIG.full()


def test_a_higher_rate_never_gives_a_larger_network():
    chosen = [PLANNER.resolve(tokens_per_s=3800 + 50 * i, phase="prefill") for i in range(80)]
    assert all(a.covers(b) for a, b in pairwise(chosen))
    assert len(set(chosen)) > 20


def test_widths_are_checked_and_returned():
    widths = CONFIG.uniform(1, 0)
    assert PLANNER.resolve(widths=widths) == widths
    with pytest.raises(ValueError, match="got 17"):
        PLANNER.resolve(widths=Widths((17,) * 12, (1,) * 12))


@pytest.mark.parametrize("name", ["fraction", "latency_ms", "tokens_per_s", "params", "memory_gb"])
def test_an_impossible_budget_names_the_best_possible(name):
    value = 1e9 if name == "tokens_per_s" else 1e-9
    with pytest.raises(
        ValueError, match=rf"budget: {name} must be at (least|most) .* \((the fastest|the smallest)"
    ) as e:
        PLANNER.resolve(**{name: value})
    named = float(re.search(r"at (?:least|most) ([\d.e+-]+)", str(e.value)).group(1))
    assert PLANNER.resolve(**{name: named}) == CONFIG.smallest()  # and it is indeed possible


@pytest.mark.parametrize("budget", [{}, {"fraction": 0.5, "params": 10}])
def test_exactly_one_budget(budget):
    with pytest.raises(ValueError, match=r"exactly one of .* must be given, got (none|fraction, params)"):
        PLANNER.resolve(**budget)


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf"), "half", True])
def test_a_budget_is_a_positive_number(value):
    with pytest.raises(ValueError, match="budget: fraction must be a positive number, got"):
        PLANNER.resolve(value)


@pytest.mark.parametrize("planner", [PLANNER, Planner(CONFIG)])
def test_a_fraction_is_at_most_one(planner):
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 1.5"):
        planner.resolve(1.5)


@pytest.mark.parametrize("budget", [{"fraction": 0.5}, {"params": 1e9}, {"widths": CONFIG.smallest()}])
def test_a_phase_is_one_of_two_whatever_the_budget(budget):
    with pytest.raises(ValueError, match="budget: phase must be one of prefill, decode, got 'train'"):
        PLANNER.resolve(**budget, phase="train")


def test_without_a_table_the_user_is_told_what_to_run():
    for budget in ({"fraction": 0.5}, {"latency_ms": 3.0}, {"tokens_per_s": 3.0}):
        with pytest.raises(ValueError, match="run `flextron profile DIR` first"):
            Planner(CONFIG).resolve(**budget)
        with pytest.raises(
            ValueError, match="of the machine x, got none of any; run `flextron profile DIR` on that"
        ):
            Planner(CONFIG).resolve(**budget, machine="x")
    with pytest.raises(ValueError, match="phase 'decode', got prefill;"):
        Planner(CONFIG, [PREFILL]).resolve(0.5, phase="decode")


def test_a_batch_far_from_the_profiled_is_refused():
    assert PLANNER.resolve(0.5, batch=1) == PLANNER.resolve(0.5, batch=2) == PLANNER.resolve(0.5)
    with pytest.raises(ValueError, match="batch must be near 1, as in the prefill latency tables, got 4"):
        PLANNER.resolve(0.5, batch=4)


def test_what_drafting_takes_is_read_from_the_decode_tables():
    draft, full = CONFIG.smallest(), CONFIG.full()
    four = replace(
        DECODE, base=2 * DECODE.base, slope=2 * DECODE.slope, workload=replace(DECODE.workload, batch=4)
    )
    planner = Planner(CONFIG, (*TABLES, four))
    share, several = planner.steps(draft, full, 1, 6)
    assert share == DECODE.predict(draft) / DECODE.predict(full)
    # between one sequence and four on a straight line, and no more beyond
    assert several == pytest.approx((1, 4 / 3, 5 / 3, 2, 2, 2))
    share, several = planner.steps(draft, full, 3, 2)
    assert share == four.predict(draft) / four.predict(full) and several == pytest.approx((1, 2 / (5 / 3)))
    assert PLANNER.steps(draft, full, 8, 3)[1] == (1, 1, 1)
    assert Planner(CONFIG, (PREFILL,)).steps(draft, full, 1, 3) is None


def test_the_trained_ladder_is_used():
    uniform = uniform_ladder(CONFIG)
    heads_last = sorted(uniform.upgrades, key=lambda upgrade: upgrade[0] == "heads")
    ladder = Ladder(uniform.mlp_choices, uniform.head_choices, 12, tuple(heads_last), "router")
    assert replace(PLANNER, ladder=ladder).resolve(0.6) != PLANNER.resolve(0.6)
    assert PLANNER.ladder.origin == "uniform"


def test_other_menus_are_refused():
    with pytest.raises(ValueError, match="must be of this model, got one of num_layers 12 instead of 4; run"):
        Planner(make_config(layers=4), TABLES)
    with pytest.raises(ValueError, match="ladder: layers and menus"):
        Planner(make_config(layers=4), (), uniform_ladder(CONFIG))


def test_loading_takes_what_is_there(tmp_path):
    assert planner_in(tmp_path, make_origin(CONFIG)) == Planner(CONFIG)
    save_tables(TABLES, tmp_path)
    assert planner_in(tmp_path, make_origin(CONFIG)) == PLANNER
