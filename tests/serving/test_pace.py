"""Deadlines of a batch's requests hold on a host whose steps take what they take, by a clock of its own."""

from __future__ import annotations

import random

import pytest
import torch
from routing.synthetic import make_config, make_table

from flextron.artefacts.planner import Planner
from flextron.serving.batch import Batch
from flextron.serving.budgets import Offer
from flextron.serving.pace import Pace, Request

CONFIG = make_config(layers=4)
OFFER = Offer(Planner(CONFIG, [make_table(CONFIG), make_table(CONFIG, "decode", base=0.5)]), {})
FULL, LEAST = OFFER.cost(CONFIG.full()), OFFER.cost(CONFIG.smallest())


class Host:
    """Runs requests in steps, prompts in pieces of at most 64 tokens; a step takes ``slow`` times the tables'.

    Args:
        jitter: share of a step's time that is drawn on top.
        moves: False: what a pace says of slowdowns and rungs is passed over, as without measurements.
    """

    def __init__(self, slow: float = 1.0, jitter: float = 0.02, moves: bool = True) -> None:
        self.slow, self.jitter, self.now, self.draw = slow, jitter, 0.0, random.Random(0)
        pace = OFFER.pace()
        self.pace = Pace(pace.rungs, pace.cost, lambda: self.now)
        if not moves:
            self.pace._move = lambda *_: None  # type: ignore[method-assign]
        self.batch = Batch(CONFIG, torch.device("cpu"), self.pace)
        self.running: dict[
            int, tuple[Request, list[int], int]
        ] = {}  # place -> request, tokens to take, to write
        self.done: dict[Request, float] = {}
        self.seen: dict[Request, list] = {}

    def add(self, prompt: int, new: int, deadline: float | None = None, widths=None) -> Request:
        end = None if deadline is None else self.now + deadline / 1e3
        request = Request(widths or CONFIG.full(), prompt, new, end)
        place = next(i for i in range(99) if i not in self.running)
        self.batch.update([], [(place, request)], [])
        pieces = [min(64, prompt - at) for at in range(0, prompt, 64)]
        self.running[place], self.seen[request] = (request, pieces, new), []
        return request

    def step(self) -> None:
        places = sorted(self.running)
        lengths = [pieces[0] if pieces else 1 for _, pieces, _ in map(self.running.get, places)]
        for to, at in enumerate(places):  # a host closes the gaps
            if to != at:
                self.batch.update([], [], [(at, to, False)])
                self.running[to] = self.running.pop(at)
        self.batch.setting(lengths, sum(lengths))
        took = 0.0
        for place, n in enumerate(lengths):
            request, pieces, left = self.running[place]
            took += OFFER.cost(request.widths).of(n)
            self.seen[request].append(request.widths)
            self.running[place] = request, pieces[1:], left - (len(pieces) <= 1)
        self.now += self.slow * (1 + self.jitter * self.draw.random()) * took / 1e3
        for place in list(self.running):
            request, _, left = self.running[place]
            if not left:
                self.done[request] = self.now
                del self.running[place]
                self.batch.update([place], [], [])

    def finish(self) -> None:
        while self.running:
            self.step()


def alone(cost, prompt: int, new: int) -> float:
    return cost.of(prompt) + new * cost.step


def test_on_a_machine_like_the_tables_a_deadline_gets_the_network_that_fits():
    for share in (0.7, 0.8, 0.9):
        host, deadline = Host(jitter=0), share * alone(FULL, 64, 40)
        request = host.add(64, 40, deadline)
        host.finish()
        assert 0.85 * deadline < 1e3 * host.done[request] <= deadline
    request = Host().add(64, 40, 2 * alone(FULL, 64, 40))
    assert request.widths == CONFIG.full()


@pytest.mark.parametrize("moves", [True, False])
def test_a_deadline_holds_on_a_machine_that_becomes_slower(moves):
    """What is planned once, from the table, is late."""
    host = Host(moves=moves)
    request = host.add(64, 60, 0.95 * alone(FULL, 64, 60))
    for i in range(60):
        host.slow = 1.25 if i > 10 else 1.0
        host.step()
    assert (host.done[request] <= request.end) == moves
    assert len({*host.seen[request]}) == 1 or moves


@pytest.mark.parametrize("moves", [True, False])
def test_deadlines_hold_while_others_come(moves):
    """Three requests with deadlines, and then some without."""
    host = Host(moves=moves)
    held = [host.add(64, 50, 3.2 * alone(FULL, 64, 50)) for _ in range(3)]
    for i in range(20):
        host.step()
        if i in (5, 10):
            host.add(96, 40, widths=CONFIG.smallest())
    host.finish()
    assert all(host.done[request] <= request.end for request in held) == moves
    if moves:  # and no faster than they must
        assert all(host.done[request] > 0.85 * request.end for request in held)


def test_a_rung_rises_again_when_the_machine_is_free():
    host = Host(jitter=0)
    crowd = [host.add(64, 30) for _ in range(3)]
    request = host.add(64, 200, 1.6 * alone(FULL, 64, 200))
    host.finish()
    sizes = [sum(widths.mlp) for widths in host.seen[request]]
    assert host.done[request] <= request.end
    assert max(host.done[each] for each in crowd) < host.done[request]
    assert sizes[-1] == max(sizes) > min(sizes)


def test_the_next_request_begins_with_what_was_learnt():
    host = Host(slow=2.0)
    host.add(64, 30)
    host.finish()
    late = host.add(64, 40, 1.5 * alone(FULL, 64, 40))
    assert late.widths != CONFIG.full()
    host.finish()
    assert host.done[late] <= late.end


def test_what_cannot_be_kept_runs_at_the_smallest_network():
    host = Host()
    request = host.add(64, 20, 1e-3)
    host.finish()
    assert {*host.seen[request]} == {CONFIG.smallest()}


def test_a_pause_of_a_host_with_nothing_to_do_is_no_step():
    host = Host(jitter=0)
    host.add(8, 6)
    host.finish()
    host.now += 1000
    host.add(8, 6)
    host.finish()
    assert host.pace.slowdowns and max(host.pace.slowdowns) == pytest.approx(1)


def test_groups_of_a_request_with_a_deadline_are_all_cached():
    batch = Batch(CONFIG, torch.device("cpu"), OFFER.pace())
    batch.update([], [(0, Request(CONFIG.smallest(), 4, 4, end=0.0))], [])
    setting = batch.setting([4], 4)
    assert setting.widths == CONFIG.smallest()
    assert setting.kv_heads == tuple(CONFIG.kv_heads(n) for n in CONFIG.full().heads)
