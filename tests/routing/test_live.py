"""Profile and measure a real, tiny elastic model: what is in the table, not how long it took."""

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from synthetic import make_table
from transformers import LlamaConfig, LlamaForCausalLM

from flextron.artefacts.latency_files import load_tables, save_tables
from flextron.artefacts.latency_table import Workload
from flextron.artefacts.machine import machine_of
from flextron.artefacts.noise import Noise
from flextron.judge import latency, timing
from flextron.judge.latency import Latency, Measurement, _filled_cache, measure, whole_model
from flextron.nn import make_elastic
from flextron.recipes import RouteConfig
from flextron.routing.fit import calibration_widths
from flextron.routing.profile import measure_adaptive, profile
from flextron.routing.static import train_routers

WORKLOADS = [Workload.prefill(8, batch=2), Workload.decode(5, batch=2)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    hf = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return make_elastic(LlamaForCausalLM(hf).eval())


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.phase)
def test_a_profile_has_a_cost_for_every_choice(model, workload, tmp_path):
    config, seen = model.elastic, []
    model.set_widths(config.smallest())
    table = profile(
        model,
        workload,
        rounds=2,
        min_seconds=0,
        fit=4,
        held_out=3,
        patience=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert model.widths == config.smallest()  # put back
    table.check(config)
    for rows, raw, menu in (
        (table.mlp, table.raw_mlp, config.mlp_choices),
        (table.heads, table.raw_heads, config.head_choices),
    ):
        assert len(rows) == config.num_layers and all(len(row) == len(menu) for row in rows)
        assert all(0 <= a <= b for row in rows for a, b in pairwise(row))
        assert all(row[0] == 0 for row in rows)
        assert all(ms > 0 for row in raw for ms in row)
    choices = sum(len(axis.menu) for axis in config.axes)
    assert (len(table.fitted), len(table.held_out)) == (4 + choices, 3)
    assert math.isfinite(table.residual_worst)
    assert seen == [(1, 2), (2, 2)]
    assert table.noise.spread >= 0 and table.spread_ms >= 0
    assert table.differs(machine_of(model)) == []
    save_tables([table], tmp_path)
    assert load_tables(tmp_path, model.elastic) == (table,)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.phase)
def test_measuring_runs_each_network_at_its_own_widths(model, workload):
    config, seen = model.elastic, set()
    handle = model.register_forward_pre_hook(lambda module, _: seen.add(module.widths))
    asked = [config.smallest(), config.uniform(0, -1)]
    found = measure(model, asked, workload, rounds=1, min_seconds=0)
    handle.remove()
    assert seen == {config.full(), *asked}
    assert all(ms > 0 and spread >= 0 for ms, spread in (found.full, *found.others))


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.phase)
def test_a_table_times_what_inference_takes(model, workload, monkeypatch):
    """On a CPU that is one op: no module of a layer runs while a table is measured."""

    def runs(*_, **__):
        raise AssertionError("a module ran")

    for part in {type(part) for pair in model.layers_of() for part in pair}:
        monkeypatch.setattr(part, "forward", runs)
    profile(model, workload, rounds=1, min_seconds=0, fit=2, held_out=1, patience=0)
    with pytest.raises(AssertionError, match="a module ran"):
        model(torch.tensor([[1, 2]]))  # with a gradient


def test_decoding_leaves_the_cache_as_it_was(model):
    config = model.elastic
    cache = _filled_cache(model, config.smallest(), WORKLOADS[1])
    assert [layer.length for layer in cache.layers] == [5, 5]
    assert [layer.groups for layer in cache.layers] == list(config.smallest().heads)
    model.set_widths(config.full())
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["cache"].get_seq_length()), with_kwargs=True
    )
    run = whole_model(model, config.full(), WORKLOADS[1])
    for _ in range(3):
        run()
    handle.remove()
    assert seen == [5, 5, 5]


def test_routers_train_on_a_real_model(model):
    config = model.elastic
    measured = profile(model, WORKLOADS[0], rounds=1, min_seconds=0, fit=4, held_out=3, patience=0)
    table = replace(  # what a quiet machine would say: no test hangs on a measured time
        measured,
        mlp=(tuple(map(float, config.mlp_choices)),) * config.num_layers,
        heads=(tuple(map(float, config.head_choices)),) * config.num_layers,
        base=10.0,
        slope=1.0,
    )
    ids = torch.arange(24).view(2, 12) % 50

    @torch.no_grad()
    def loss(widths) -> float:
        model.set_widths(widths)
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)

    fastest = table.smallest_ms / table.full_ms
    options = RouteConfig(
        targets=((1 + fastest) / 2, 1.0), evaluations=30, prefill=16, steps=20, surrogate_steps=20
    )
    result = train_routers(config, table, loss, options)
    assert result.ladder.rungs[-1] == config.full()
    assert result.targets[0].rung_fraction <= result.targets[0].target * (1 + 1e-8)


@pytest.mark.parametrize(("patience", "rounds"), [(100.0, 5), (1.5, 4), (0.0, 2)])
def test_a_profile_goes_on_until_it_predicts_what_it_was_not_fitted_on(model, monkeypatch, patience, rounds):
    """A paper machine that is disturbed while it times one network in the first two rounds, and not in the others."""
    config, workload = model.elastic, WORKLOADS[0]
    paper = replace(make_table(config), workload=workload)
    _, (judged, *_) = calibration_widths(config, 4, 3, 0)
    seen = dict.fromkeys((judged,), 0)

    def clock(run, repeats):
        widths = model.widths
        seen[widths] = seen.get(widths, 0) + 1
        disturbed = widths == judged and seen[judged] <= 2 + 2  # the warm-up, two rounds
        return paper.predict(widths) / 1e3 * (1.5 if disturbed else 1.0)

    now = [0.0]

    def monotonic():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(latency, "clock_of", lambda device: clock)
    monkeypatch.setattr("flextron.routing.profile.monotonic", monotonic)
    monkeypatch.setattr(timing.NoiseWatch, "_taken", lambda self: 0.0)  # whatever runs beside this test
    asked = []
    table = profile(
        model, workload, rounds=2, min_seconds=0, fit=4, held_out=3, patience=patience,
        progress=lambda *done: asked.append(done),
    )  # fmt: skip
    assert len(asked) == rounds and asked[-1] == (rounds, rounds)
    assert (table.residual_worst < 0.05) == (patience == 100.0)
    assert table.doubt is None if patience == 100.0 else "an error of" in table.doubt


def test_a_profile_goes_on_until_fractions_are_known_to_three_in_a_hundred(model, monkeypatch):
    """A paper machine whose every time is off by 4 %."""
    paper, draw = replace(make_table(model.elastic), workload=WORKLOADS[0]), random.Random(0)
    monkeypatch.setattr(timing.NoiseWatch, "_taken", lambda self: 0.0)

    def clock(run, repeats):
        return paper.predict(model.widths) / 1e3 * draw.gauss(1, 0.04)

    monkeypatch.setattr(latency, "clock_of", lambda device: clock)
    rounds = []
    for patience, known in ((0.0, False), (100.0, True)):
        off = []
        for _ in range(4):
            table = profile(
                model, WORKLOADS[0], rounds=2, min_seconds=0, patience=patience,
                progress=lambda done, _: rounds.append(done),
            )  # fmt: skip
            off += [abs(table.fraction(c.widths) / paper.fraction(c.widths) - 1) for c in table.held_out]
        assert (max(off) < 0.03) == known
    assert max(rounds) > 8


def test_a_profile_waits_for_other_programs_as_long_as_it_may(model, monkeypatch):
    paper = replace(make_table(model.elastic), workload=WORKLOADS[0])
    taken = iter([0.4, 0.4, 0.05, 0.05])  # one look after each round, and one at the end
    monkeypatch.setattr(timing.NoiseWatch, "_taken", lambda self: next(taken))
    monkeypatch.setattr(latency, "clock_of", lambda device: lambda run, repeats: paper.predict(model.widths))
    table = profile(model, WORKLOADS[0], rounds=1, min_seconds=0, fit=4, held_out=3)
    assert table.noise.taken == 0.05 and table.doubt is None and next(taken, None) is None


def test_a_profile_needs_something_to_judge_by(model):
    with pytest.raises(ValueError, match="held_out at least 1, got 4 and 0"):
        profile(model, WORKLOADS[0], fit=4, held_out=0)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.phase)
def test_the_cost_of_choosing_for_every_token_is_fitted_on_mixtures(model, workload, monkeypatch):
    """Times of a paper machine, where a router costs 4 ms and a layer's own cost counts 1.5 times: both are found."""
    config = model.elastic
    table = replace(make_table(config), workload=workload)
    taken = []

    def paper(model, dials, workload, **_):
        times = []
        for dial in dials:
            run = whole_model(model, dial, workload)
            model.turn(dial)
            with model.watched() as forwards:
                run()
            sums = float(replace(table, base=0.0, slope=1.0).of_tokens(forwards[0]))
            taken.append((forwards[0], sums))
            times.append(4 + 1.5 * sums)
        latencies = (Latency(ms, 0.0) for ms in times)
        return Measurement(Latency(table.full_ms, 0.0), tuple(latencies), Noise(0.0, 0.0, 0.0), ())

    monkeypatch.setattr("flextron.routing.profile.measure", paper)
    model.attach_router(None)
    model.set_widths(config.smallest())
    found = measure_adaptive(model, table)
    assert found.adaptive == pytest.approx((4, 1.5))
    assert replace(found, adaptive=None) == table
    assert model.adaptive is None and model.widths == config.smallest()
    (low, least), (_, most), *mixed = taken
    assert all((axis == 0).all() for axis in low)
    assert most > max(sums for _, sums in mixed) > min(sums for _, sums in mixed) > least
    if workload.phase == "prefill":
        assert any(
            len(axis[..., layer].unique()) == 2 for one, _ in mixed for axis in one for layer in range(2)
        )
