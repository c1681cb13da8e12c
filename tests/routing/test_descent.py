"""The descent by measured steps: what it gives up first, and how many losses it asks for."""

from __future__ import annotations

from itertools import chain

from synthetic import make_config, make_table

from flextron.routing.descent import descend, steps_from

CONFIG = make_config(layers=3)
TABLE = make_table(CONFIG)


def additive(costs):
    """A loss that adds up over layers: ``costs[axis][layer]`` nats for each choice given up."""
    top = [count - 1 for count in CONFIG.choices]

    def loss(widths):
        pairs = zip(costs, CONFIG.indices(widths), top, strict=True)
        return sum(c * (most - place) for row, own, most in pairs for c, place in zip(row, own, strict=True))

    return loss


def test_the_cheapest_for_its_time_goes_first():
    """Greedy is right where every step of a layer costs the same: prices in order, whatever was given up before."""
    costs = ([0.5, 0.01, 0.3], [0.02, 0.9, 0.04])
    ladder = descend(CONFIG, TABLE, additive(costs))

    def price(upgrade, place):
        axis = ("mlp", "heads").index(upgrade[0])
        row = TABLE.by_axis[axis][upgrade[1]]
        return costs[axis][upgrade[1]] / (row[place] - row[place - 1])

    places, prices = {}, []
    for upgrade in ladder.upgrades:
        places[upgrade] = places.get(upgrade, 0) + 1
        prices.append(price(upgrade, places[upgrade]))
    whole = {}  # a layer whose later step is cheaper for its time gives up both at once, at their mean
    for upgrade, p in zip(ladder.upgrades, prices, strict=True):
        whole.setdefault(upgrade, []).append(p)
    means = [sum(whole[u]) / len(whole[u]) for u in dict.fromkeys(ladder.upgrades)]
    assert means == sorted(means, reverse=True)


def test_every_single_step_is_asked_for_once():
    asked = []

    def counted(widths):
        asked.append(widths)
        return additive(([0.5, 0.01, 0.3], [0.02, 0.9, 0.04]))(widths)

    ladder = descend(CONFIG, TABLE, counted)
    assert ladder.rungs[-1] == CONFIG.full() and len(set(asked)) == len(asked) == 15
    assert set(asked) == set(steps_from(CONFIG, CONFIG.full()).values())


def test_a_choice_that_saves_little_for_what_it_costs_is_skipped():
    """The step to the choice below it costs hardly more, and saves far more time: both are given up at once."""
    full = CONFIG.indices(CONFIG.full())

    def loss(widths):
        place = CONFIG.indices(widths)[0][0]
        pairs = zip(chain(*CONFIG.indices(widths)), chain(*full), strict=True)
        others = sum(a != b for a, b in pairs)
        return {3: 0.0, 2: 0.10, 1: 0.11, 0: 5.0}[place] + 0.06 * (others - (place != 3))

    ladder = descend(CONFIG, TABLE, loss)
    last = [step for step in ladder.upgrades if step == ("mlp", 0)]
    first, second = (i for i, step in enumerate(ladder.upgrades[1:], 1) if step == ("mlp", 0))
    assert len(last) == 3 and second == first + 1
