"""A deadline that holds: the controller on a clock that only moves when told to, and generations that it turns."""

from __future__ import annotations

import copy
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from nn.models import small_model
from nn.test_elastic_model import elastic, tokens
from routing.synthetic import make_table
from transformers.generation.streamers import BaseStreamer

from flextron.artefacts.ladder import uniform_ladder
from flextron.artefacts.planner import Planner
from flextron.config import Widths
from flextron.nn import ElasticCache, deadline, graph, make_elastic, rooms
from flextron.nn.deadline import Controller, Hold
from flextron.nn.steps import Steps

LADDER = [4 + 0.1 * i for i in range(61)]  # 4 .. 10 ms


def driven(controller: Controller, slowdown: Any, limit: float = 8.0, steps: int = 400, seed: int = 0) -> Any:
    """The rung and time of each step on a machine that is ``slowdown(step)`` times as slow as the table says."""
    rng, rung = random.Random(seed), controller.begin(limit)
    seen = []
    for i in range(steps):
        ms = controller.predicted[rung] * slowdown(i) * (1 + 0.02 * rng.random())
        seen.append((rung, ms))
        rung = controller.step(rung, ms, limit)
    return seen


def share(seen: Any, limit: float = 8.0) -> float:
    return sum(ms <= limit for _, ms in seen) / len(seen)


def test_on_a_machine_like_the_tables_the_rung_is_the_tables_to_the_jitter():
    seen = driven(Controller(LADDER), lambda i: 0.99)
    assert len({rung for rung, _ in seen}) <= 2 and share(seen) > 0.99
    assert LADDER[seen[-1][0]] == pytest.approx(8.0, rel=0.03)


def test_two_slow_steps_lower_the_rung_and_one_does_not():
    controller = Controller(LADDER)
    before = controller.begin(8.0)
    assert controller.step(before, 80.0, 8.0) == before
    assert controller.step(before, 8.0, 8.0) == before
    lower = controller.step(before, 16.0, 8.0)
    assert LADDER[lower] * 2 <= 8.0 < LADDER[before] * 2


def test_a_slow_while_costs_two_late_steps_and_ends_a_window_after_it():
    """Half the machine is gone for 100 of 400 steps."""
    controller = Controller(LADDER)
    seen = driven(controller, lambda i: 1.9 if 100 <= i < 200 else 0.97)
    late = [i for i, (_, ms) in enumerate(seen) if ms > 8.0]
    assert late == [100, 101]
    assert all(LADDER[rung] * 1.9 <= 8.0 for rung, _ in seen[102:200])
    assert all(LADDER[rung] > 7.4 for rung, _ in seen[217:])


def test_without_a_controller_the_same_steps_are_late():
    fixed = Controller(LADDER).begin(8.0)
    controller = Controller([LADDER[fixed]])
    assert share(driven(controller, lambda i: 1.9 if 100 <= i < 200 else 0.97)) <= 0.75


def test_a_table_that_says_double_is_found_out_within_a_window():
    """A profile beside another program predicted 904 ms for what takes 451."""
    seen = driven(Controller(LADDER), lambda i: 0.5, limit=4.9)
    assert LADDER[seen[0][0]] <= 4.9
    assert all(LADDER[rung] * 0.5 > 4.5 for rung, _ in seen[20:]) and share(seen, 4.9) == 1


def test_the_floor_is_kept_however_slow_the_machine_is():
    seen = driven(Controller(LADDER, lowest=20), lambda i: 3.0)
    assert {rung for rung, _ in seen[2:]} == {20}


def test_a_rise_that_fails_again_and_again_is_tried_ever_more_seldom():
    """A higher rung is slower than its table says: each try costs two late steps."""
    seen = driven(Controller(LADDER), lambda i: 1.0, steps=16)
    controller, limit, rung = Controller(LADDER), 8.0, 40
    late, rises, last = 0, [], 0
    controller.begin(limit)
    for i in range(1000):
        ms = LADDER[rung] * (1.0 if rung <= 30 else 1.3)
        late += ms > limit
        rung = controller.step(rung, ms, limit)
        if rung > last:
            rises.append(i)
        last = rung
    assert len(seen) == 16 and late <= 20
    gaps = [b - a for a, b in pairwise(rises)]
    assert gaps == sorted(gaps) and gaps[-1] > 4 * gaps[0]


def test_small_changes_of_the_machine_move_nothing():
    """Hysteresis: between the limit and 95 % of it the rung stays."""
    controller = Controller(LADDER)
    seen = driven(controller, lambda i: 0.98 + 0.02 * (i // 40 % 2), steps=800)
    assert len({rung for rung, _ in seen[100:]}) == 1


class Clock:
    """Seconds that pass when a step of a model at some widths runs, as a paper machine takes them."""

    def __init__(self, model: Any, table: Any) -> None:
        self.model, self.table, self.now, self.slow = model, table, 0.0, 1.0
        self.steps: list[Widths] = []

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.steps.append(self.model.widths)
        self.now += self.slow * self.table.predict(self.model.widths) / 1e3


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model with a planner of a paper table, whose steps and prompts take the table's time on a clock of its own."""
    model = elastic()
    table = make_table(model.elastic, "decode")
    model.planner = Planner(model.elastic, (table,), uniform_ladder(model.elastic))
    monkeypatch.setattr(type(model.planner), "at", lambda self, *_: self)
    clock = Clock(model, table)
    for name in ("_by_step", "_by_forward"):
        plain = getattr(Steps, name)

        def step(self: Any, ids: Any, plain: Any = plain) -> Any:
            clock.run()
            return plain(self, ids)

        monkeypatch.setattr(Steps, name, step)
    made = Hold.__init__
    monkeypatch.setattr(
        Hold, "__init__", lambda self, *args, **kwargs: made(self, *args, **(kwargs | {"clock": clock}))
    )
    return model, table, clock


ASK = dict(do_sample=False, pad_token_id=0)


def test_a_generation_keeps_to_milliseconds_and_tells_every_tokens_budget(timed):
    model, table, clock = timed
    limit = 0.8 * table.full_ms
    begun = model.set_budget(latency_ms=limit, phase="decode", hold=True)
    assert begun == model.planner.resolve(latency_ms=limit, phase="decode") == model.widths
    assert model.kv == "all" and model.held is None

    class Slows(BaseStreamer):
        seen = 0

        def put(self, _: Any) -> None:
            self.seen += 1
            clock.slow = 1.3 if self.seen > 6 else 1.0

        def end(self) -> None: ...

    ids = model.generate(tokens(2, 5), max_new_tokens=60, **ASK)
    assert ids.shape == (2, 65)
    assert [t.widths for t in model.held.tokens] == [begun] * 60 and model.held.within == 1
    model.generate(tokens(1, 5), max_new_tokens=60, streamer=Slows(), **ASK)
    held = model.held
    assert len(held.tokens) == 60 and held.tokens[0].ms is None and held.tokens[0].widths == begun
    assert [t.widths for t in held.tokens[1:]] == clock.steps[-59:]
    late = [i for i, t in enumerate(held.tokens) if t.ms is not None and t.ms > limit]
    assert len(late) == 2 and held.within == 57 / 59
    assert begun.covers(held.tokens[-1].widths) and begun != held.tokens[-1].widths
    assert held.fraction == pytest.approx(sum(table.fraction(t.widths) for t in held.tokens) / 60)
    assert model.widths == begun  # what moved was the generation's alone
    again = model.generate(tokens(1, 5), max_new_tokens=2, **ASK)
    assert again.shape == (1, 7) and model.held.tokens[0].widths != begun  # what was learnt stays


def test_a_whole_generation_keeps_to_its_deadline(timed):
    model, table, clock = timed
    for share, slow in ((0.8, 1.0), (0.8, 1.2), (0.9, 0.5)):
        clock.slow, total = slow, 40 * share * table.full_ms
        model.generate(tokens(1, 5), max_new_tokens=40, deadline_ms=total, **ASK)
        assert model.held.within == 1 and len(model.held.tokens) == 40
        assert 0.8 * total < model.held.total_ms <= total or slow == 0.5
    assert model.held.tokens[-1].fraction == 1  # twice as fast as the table says
    assert model.widths == model.elastic.full()


def test_what_cannot_be_kept_runs_at_the_floor(timed):
    model, table, clock = timed
    floor = model.planner.resolve(0.7, phase="decode")
    model.generate(tokens(1, 5), max_new_tokens=12, deadline_ms=1e-3, floor=0.7, **ASK)
    assert {t.widths for t in model.held.tokens} == {floor} and model.held.within == 0
    model.set_budget(latency_ms=0.9 * table.full_ms, phase="decode", hold=True, floor={"fraction": 0.7})
    clock.slow = 10.0
    model.generate(tokens(1, 5), max_new_tokens=12, **ASK)
    assert {t.widths for t in model.held.tokens[3:]} == {floor}


def test_the_tokens_are_those_of_the_budgets_that_were_recorded(timed):
    """Replayed by hand: each token's forward at its recorded widths, in one cache."""
    model, table, clock = timed
    model.set_budget(latency_ms=0.8 * table.full_ms, phase="decode", hold=True)
    clock.slow = 1.25
    ids = model.generate(tokens(1, 5), max_new_tokens=30, **ASK)
    held = model.held.tokens
    assert len({t.widths for t in held}) > 1
    cache, given = ElasticCache(), tokens(1, 5)
    with torch.no_grad():
        for i, token in enumerate(held):
            model.set_widths(token.widths, kv="all")
            logits = model(given, cache=cache, use_cache=True).logits
            given = logits[:, -1].argmax(-1, keepdim=True)
            assert int(given) == int(ids[0, 5 + i])


def test_another_budget_between_tokens_ends_the_hold(timed):
    model, table, clock = timed
    model.set_budget(latency_ms=0.8 * table.full_ms, phase="decode", hold=True)

    class Sets(BaseStreamer):
        seen = 0

        def put(self, _: Any) -> None:
            self.seen += 1
            if self.seen == 3:  # the prompt, the first token, the second
                model.set_widths(model.elastic.smallest(), kv="all")

        def end(self) -> None: ...

    model.generate(tokens(1, 5), max_new_tokens=8, streamer=Sets(), **ASK)
    assert [t.widths for t in model.held.tokens] == [model.planner.resolve(0.8, phase="decode")] * 2
    assert clock.steps[1:] == [model.elastic.smallest()] * 6
    assert model.widths == model.held.tokens[0].widths  # what the streamer set was the call's alone


def test_a_copy_of_a_held_model_holds(timed):
    model, table, _ = timed
    model.set_budget(latency_ms=0.8 * table.full_ms, phase="decode", hold=True)
    other = copy.deepcopy(model)
    other.generate(tokens(1, 5), max_new_tokens=4, **ASK)
    assert len(other.held.tokens) == 4 and other.dial.hold is not model.dial.hold


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(fraction=0.5, hold=True), "hold must be given with latency_ms and phase='decode'"),
        (dict(latency_ms=5.0, hold=True), "got latency_ms and phase='prefill'"),
        (dict(latency_ms=5.0, phase="decode", hold=True, adaptive=True), "adaptive"),
        (dict(latency_ms=5.0, phase="decode", hold=True, kv="selected"), "kv must be 'all' with hold"),
        (dict(latency_ms=[5.0, 6.0], phase="decode", hold=True), "latency_ms must be one number with hold"),
        (dict(latency_ms=5.0, phase="decode", floor=0.5), "floor must be given with hold=True"),
        (dict(latency_ms=1e-3, phase="decode", hold=True), "latency_ms must be at least"),
        (dict(latency_ms=5.0, phase="decode", hold=True, floor=1.0), "which the floor takes, got 5"),
        (dict(latency_ms=50.0, phase="decode", hold=True, floor=[0.7, 0.8]), "floor must be one budget"),
    ],
)
def test_bad_deadlines_are_one_sentence_and_change_nothing(timed, asked, said):
    model, _, _ = timed
    before = model.dial
    with pytest.raises(ValueError, match=said):
        model.set_budget(**asked)
    assert model.dial is before


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(floor=0.5), "floor must be given with deadline_ms"),
        (dict(deadline_ms=0), "deadline_ms must be a positive number"),
        (dict(deadline_ms=float("nan")), "deadline_ms must be a"),
        (dict(deadline_ms=9.0, budget=0.5), "given without a budget"),
        (dict(deadline_ms=9.0, draft_budget=0.7), "draft_budget must be given without a deadline"),
    ],
)
def test_bad_deadlines_of_a_call_are_one_sentence(timed, asked, said):
    with pytest.raises(ValueError, match=said):
        timed[0].generate(tokens(1, 5), max_new_tokens=3, **asked, **ASK)


@pytest.mark.parametrize("given", [dict(num_beams=2), dict(use_cache=False)])
def test_generations_that_are_not_ours_are_refused(timed, given):
    with pytest.raises(NotImplementedError, match="generate: a deadline must be held by"):
        timed[0].generate(tokens(1, 5), max_new_tokens=3, deadline_ms=50.0, **given, **ASK)


@pytest.mark.parametrize("ends", [None, 7])
def test_a_captured_step_is_timed_by_events_that_nobody_waits_for(monkeypatch, ends):
    """As on a GPU: events come two steps late, and a change of budget goes into the next replay."""
    model = make_elastic(small_model())
    table = make_table(model.elastic, "decode")
    model.planner = Planner(model.elastic, (table,), uniform_ladder(model.elastic))
    monkeypatch.setattr(type(model.planner), "at", lambda self, *_: self)
    monkeypatch.setattr(rooms, "CAPTURED_ON", ("cpu",))
    clock, ran, waits = Clock(model, table), [], []
    clock.slow = 1.3

    def captured(run: Any, state: Any) -> Any:
        def replay() -> Any:
            clock.run()
            ran.append(clock.now)
            return run(state)

        return replay

    monkeypatch.setattr(graph, "captured", captured)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, _: Any) -> None:
            self.at = clock.now

        def query(self) -> bool:
            return False  # never done before it is waited for

        def synchronize(self) -> None:
            waits.append(len(ran) - ran.index(self.at) - 1)

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(deadline, "_watch_of", lambda device, clock: deadline._DeviceWatch(device))
    limit = 0.8 * table.full_ms
    begun = model.set_budget(latency_ms=limit, phase="decode", hold=True)
    model.generate(tokens(1, 5), max_new_tokens=40, eos_token_id=ends, **ASK)
    held = model.held
    assert waits and set(waits) == {2}  # the host is at most two steps ahead, and waits for no later one
    times = [t.ms for t in held.tokens[1:] if t.ms is not None]
    assert len(times) >= len(held.tokens) - 3
    late = sum(ms > limit for ms in times)
    assert 2 <= late <= 2 + 2 and begun.covers(held.tokens[-1].widths) and begun != held.tokens[-1].widths
    assert [t.widths for t in held.tokens[1:]] == clock.steps[: len(held.tokens) - 1]
