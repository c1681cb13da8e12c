"""The ladder: nested, monotone, deterministic, and read off a router in the router's own order."""

import random
from itertools import pairwise

import pytest
import torch
from routing.synthetic import make_config, make_table

from flextron.artefacts.ladder import Ladder, router_ladder, uniform_ladder
from flextron.checkpoint.schema import build
from flextron.nn.router import StaticRouter

CONFIG = make_config()
TABLE = make_table(CONFIG)
TARGETS = (0.45, 0.6, 0.8, 1.0)


def loud_router(seed: int) -> StaticRouter:
    """An untrained router with large logits: its choices jump up and down with the target."""
    router = StaticRouter(CONFIG.num_layers, (4, 3), TARGETS, seed=seed)
    with torch.no_grad():
        router.rows.weight.mul_(20)
    return router


def ladders() -> list[Ladder]:
    return [
        uniform_ladder(CONFIG),
        router_ladder(CONFIG, loud_router(0)),
        router_ladder(CONFIG, loud_router(1)),
    ]


@pytest.mark.parametrize("ladder", ladders())
def test_rungs_are_nested_from_the_smallest_to_the_full(ladder):
    assert ladder.rungs[0] == CONFIG.smallest()
    assert ladder.rungs[-1] == CONFIG.full()
    assert len(ladder.rungs) == 1 + 12 * (3 + 2)
    for low, high in pairwise(ladder.rungs):
        assert high.covers(low) and high != low
        CONFIG.check(high)


@pytest.mark.parametrize("ladder", ladders())
def test_a_larger_target_never_gives_a_smaller_network(ladder):
    chosen = [ladder.highest(TABLE.fraction, 0.45 + 0.005 * i) for i in range(111)]
    assert all(b.covers(a) for a, b in pairwise(chosen))
    assert chosen[-1] == CONFIG.full()


@pytest.mark.parametrize("ladder", ladders())
def test_the_target_is_met_within_one_rung(ladder):
    largest_step = 1.1 * 0.2 / TABLE.full_ms  # of one head unit
    for i in range(50):
        target = 0.45 + 0.011 * i
        fraction = TABLE.fraction(ladder.highest(TABLE.fraction, target))
        assert target - largest_step < fraction <= target * (1 + 1e-8)


@pytest.mark.parametrize("ladder", ladders())
def test_bisection_finds_what_a_scan_finds(ladder):
    for limit in (0.1, 0.43, 0.5, 0.7777, 1.0, 2.0):
        scan = [w for w in ladder.rungs if TABLE.fraction(w) <= limit * (1 + 1e-9)]
        assert ladder.highest(TABLE.fraction, limit) == (scan[-1] if scan else None)


def test_the_readout_is_deterministic():
    assert router_ladder(CONFIG, loud_router(3)) == router_ladder(CONFIG, loud_router(3))
    assert router_ladder(CONFIG, loud_router(3)) != router_ladder(CONFIG, loud_router(4))


def decisive_router() -> tuple[StaticRouter, list[int]]:
    """A router that wants one more layer whole at every target, in a known order."""
    layers = list(range(CONFIG.num_layers))
    random.Random(5).shuffle(layers)
    targets = [0.4 + 0.05 * i for i in range(CONFIG.num_layers + 1)]
    router = StaticRouter(CONFIG.num_layers, (4, 3), targets, hidden=64)
    wants = torch.zeros(len(targets), CONFIG.num_layers, 7)
    for i in range(len(targets)):
        for place, layer in enumerate(layers):
            whole = place < i
            wants[i, layer, 3 if whole else 0] = wants[i, layer, 6 if whole else 4] = 1.0
    with torch.no_grad():  # targets -> themselves -> what is wanted
        router.body.weight.zero_()
        router.body.bias.zero_()
        router.rows.weight.zero_()
        router.rows.bias.zero_()
        for i in range(len(targets)):
            router.body.weight[i, i] = 1.0
            router.rows.weight[:, i] = wants[i].flatten() * 64**0.5
    return router, layers


def test_the_ladder_passes_through_what_the_router_chose():
    router, layers = decisive_router()
    ladder = router_ladder(CONFIG, router)
    for i, target in enumerate(router.targets):
        chosen = router.choose(target)
        assert sorted(layers[:i]) == chosen.mlp.nonzero().flatten().tolist()
        widths = ladder.rungs[5 * i]
        assert [CONFIG.mlp_choices.index(d) for d in widths.mlp] == chosen.mlp.tolist()
        assert [CONFIG.head_choices.index(n) for n in widths.heads] == chosen.heads.tolist()


def test_upgrades_that_appear_together_follow_the_margin():
    router = StaticRouter(CONFIG.num_layers, (4, 3), (0.5, 1.0), hidden=8)
    with torch.no_grad():
        router.rows.weight.zero_()
        rows = router.rows.bias.view(CONFIG.num_layers, 7)
        rows[:, 1] = torch.tensor([5.0, 1.0, 9.0, 3.0, 2.0, 8.0, 7.0, 4.0, 6.0, 11.0, 10.0, 0.5])
    first = router_ladder(CONFIG, router).upgrades[:12]
    assert first == tuple(("mlp", layer) for layer in (9, 10, 2, 5, 6, 8, 0, 7, 3, 4, 1, 11))


def test_the_uniform_ladder_is_even():
    ladder = uniform_ladder(CONFIG)
    for widths in ladder.rungs:
        for menu, chosen in ((CONFIG.mlp_choices, widths.mlp), (CONFIG.head_choices, widths.heads)):
            index = [menu.index(width) for width in chosen]
            assert max(index) - min(index) <= 1
            half = len(index) // 2
            assert abs(sum(index[:half]) - sum(index[half:])) <= 1


def test_ladders_survive_a_dictionary():
    for ladder in ladders():
        assert build(Ladder, ladder.to_dict(), "routers.json") == ladder


def test_a_ladder_that_misses_a_step_is_refused():
    good = uniform_ladder(CONFIG)
    with pytest.raises(ValueError, match="upgrades must take each of 12 layers"):
        Ladder(good.mlp_choices, good.head_choices, 12, good.upgrades[:-1], "uniform")


def test_a_ladder_of_other_menus_is_refused():
    with pytest.raises(ValueError, match="run `flextron route DIR` again"):
        uniform_ladder(make_config(layers=3)).check(CONFIG)
