"""Budgets of requests become the widths that `generate` takes at the same budget."""

from __future__ import annotations

import pytest
import torch
from routing.synthetic import make_config, make_table

from flextron.artefacts.planner import Planner
from flextron.serving.budgets import Offer, budget_of

CONFIG = make_config(layers=4)
PLANNER = Planner(CONFIG, [make_table(CONFIG), make_table(CONFIG, "decode", base=0.5)])
OFFER = Offer(PLANNER, {})


def test_a_budget_is_what_it_is_elsewhere():
    assert OFFER.widths({"budget": 0.6, "temperature": 0}) == PLANNER.resolve(fraction=0.6)
    step = PLANNER.resolve(latency_ms=5.0, phase="decode")
    assert OFFER.widths({"latency_ms": 5.0}) == step != PLANNER.resolve(latency_ms=5.0)
    assert OFFER.widths({}) == OFFER.widths({"budget": 1}) == OFFER.widths({"budget": None}) == CONFIG.full()
    assert Offer(Planner(CONFIG), {}).widths({"budget": 1}) == CONFIG.full()  # without a table


def test_a_deadline_may_take_the_full_model_where_times_are_known():
    assert OFFER.widths({"deadline_ms": 1.0}) == CONFIG.full()
    prefill, decode = PLANNER.table("prefill"), PLANNER.table("decode")
    own = OFFER.cost(CONFIG.smallest())
    assert own == (prefill.predict(CONFIG.smallest()) / 128, decode.predict(CONFIG.smallest()))
    assert [widths for widths, _ in OFFER.pace().rungs] == list(PLANNER.ladder.rungs)
    untimed = Offer(Planner(CONFIG), {})
    assert untimed.pace() is None
    with pytest.raises(ValueError, match="must have a table of phase 'prefill', got none"):
        untimed.widths({"deadline_ms": 1.0})


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (
            {"budget": 0.5, "latency_ms": 3},
            "at most one of budget, latency_ms, deadline_ms, got budget, latency_ms",
        ),
        ({"budget": "half"}, "budget must be a number, got 'half'"),
        ({"budget": 1.5}, r"budget must be in \(0, 1\], got 1.5"),
        ({"budget": 0}, r"budget must be in \(0, 1\], got 0"),
        ({"deadline_ms": -1}, "deadline_ms must be a positive number, got -1"),
        ({"latency_ms": float("inf")}, "latency_ms must be a positive number, got inf"),
        ({"budget": 0.01}, "fraction must be at least .* got 0.01"),
    ],
)
def test_a_budget_that_is_none_is_refused(request_, said):
    with pytest.raises(ValueError, match=said):
        OFFER.widths(request_)


def test_a_server_with_one_budget_takes_no_other():
    offer = Offer(PLANNER, budget_of({"budget": 0.6}))
    assert offer.widths({}) == offer.widths({"budget": 0.6}) == offer.widest == PLANNER.resolve(fraction=0.6)
    with pytest.raises(
        ValueError, match=r"must be the server's own, budget 0.6, or not be given, got latency_ms 3"
    ):
        offer.widths({"latency_ms": 3})
    (only,) = offer.listed()
    assert only["budget"] == 0.6


def test_budgets_are_listed_with_their_networks():
    found = OFFER.listed()
    assert found[-1]["budget"] == 1 and found[-1]["params"] == CONFIG.params(CONFIG.full())
    for entry in found:
        widths = OFFER.widths({"budget": entry["budget"]})
        assert entry["params"] == CONFIG.params(widths)
        assert entry["latency_ms"] == pytest.approx(PLANNER.predict(widths, "decode"), abs=1e-4)
    assert len({entry["params"] for entry in found}) == len(found) > 5
    (full,) = Offer(Planner(CONFIG), {}).listed()
    assert full == {"budget": 1, "params": CONFIG.params(CONFIG.full())}


def test_an_offer_is_read_from_a_checkpoint(tmp_path):
    from serving.checkpoint import build

    directory, cpu = build(tmp_path), torch.device("cpu")
    offer = Offer.read(directory, {"budget": 0.7}, torch.float32, cpu)
    assert offer.widest == offer.planner.resolve(fraction=0.7) != offer.config.full()
    for own, said in (({"budget": 0.01}, "fraction must be"), ({"deadline_ms": 5}, "got deadline_ms")):
        with pytest.raises(ValueError, match=said):
            Offer.read(directory, own, torch.float32, cpu)
