"""Promises of the sampler: the frequencies it states, from a generator of its own."""

from __future__ import annotations

from collections import Counter
from itertools import product
from statistics import NormalDist

import pytest
import torch

from flextron.config import Counts, ElasticConfig, Widths
from flextron.training import WidthSampler, homogeneous

DRAWS = 4000
# A test at this level fails by chance once in 100 000 seeds; the seed is fixed, so it fails always or never.
LEVEL = 1e-5


def menus(mlp=(1, 2, 3, 4), heads=(1, 2, 4), layers=3) -> ElasticConfig:
    return ElasticConfig(
        family="llama",
        unit="kv_group",
        num_layers=layers,
        hidden_size=8,
        intermediate_size=mlp[-1],
        num_heads=2 * heads[-1],
        num_kv_heads=heads[-1],
        head_dim=2,
        vocab_size=11,
        tied=True,
        qk_norm=False,
        counts=Counts.of_llama(layers, 8, 2, 11, tied=True),
        mlp_choices=mlp,
        head_choices=heads,
    )


def assert_frequencies(counts: Counter, probabilities: dict) -> None:
    """Pearson's chi-square test of counts against probabilities."""
    assert set(counts) <= set(probabilities)
    n, k = sum(counts.values()), len(probabilities) - 1
    statistic = sum((counts[x] - n * p) ** 2 / (n * p) for x, p in probabilities.items())
    # quantile of chi-square with k degrees of freedom: Wilson and Hilferty, 1931
    bound = k * (1 - 2 / (9 * k) + NormalDist().inv_cdf(1 - LEVEL) * (2 / (9 * k)) ** 0.5) ** 3
    assert statistic < bound, (statistic, bound, counts)


def expected(config: ElasticConfig, full: float) -> list[dict]:
    """Probability of each choice on the two axes of any layer: the mixture the design states."""
    alike = homogeneous(config)
    marginals = []
    for axis, menu in (("mlp", config.mlp_choices), ("heads", config.head_choices)):
        same = Counter(getattr(w, axis)[0] for w in alike)
        marginals.append(
            {
                c: full * (c == menu[-1]) + (1 - full) / 2 * (same[c] / len(alike) + 1 / len(menu))
                for c in menu
            }
        )
    return marginals


@pytest.mark.parametrize("full", [0.0, 0.3, 0.8])
@pytest.mark.parametrize(
    ("mlp", "heads"), [((1, 2, 3, 4), (1, 2, 4)), ((2, 8), (1, 2, 3, 4)), ((5,), (1, 2))]
)
def test_every_choice_occurs_as_often_as_stated(mlp, heads, full):
    config = menus(mlp, heads)
    sampler = WidthSampler(config, full, seed=1)
    draws = [sampler.draw() for _ in range(DRAWS)]
    for axis, probabilities in zip(("mlp", "heads"), expected(config, full), strict=True):
        for layer in range(config.num_layers):
            counts = Counter(getattr(w, axis)[layer] for w in draws)
            if len(probabilities) > 1:
                assert_frequencies(counts, probabilities)


def test_kinds_of_draw_occur_as_often_as_stated():
    config = menus()
    sampler = WidthSampler(config, 0.3, seed=2)
    alike = homogeneous(config)
    kinds = Counter()
    for _ in range(DRAWS):
        widths = sampler.draw()
        kinds["full" if widths == config.full() else "alike" if widths in alike else "mixed"] += 1
    # independent choices that happen to be alike: every layer the same of (4 x 3)^3 combinations
    chance = 0.35 / (4 * 3) ** 3
    full = 0.3 + 0.35 / 4 + chance
    same = 0.35 * 3 / 4 + 3 * chance
    assert_frequencies(kinds, {"full": full, "alike": same, "mixed": 1 - full - same})


def test_layers_and_axes_of_a_mixed_draw_are_independent():
    config = menus((1, 2), (1, 2), layers=2)
    sampler = WidthSampler(config, 0.0, seed=3)
    counts = Counter((w.mlp, w.heads) for w in (sampler.draw() for _ in range(DRAWS)))
    flat = {((a, b), (c, d)): 0.5 / 16 for a, b, c, d in product((1, 2), repeat=4)}
    for widths in homogeneous(config):
        flat[widths.mlp, widths.heads] += 0.5 / 2
    assert_frequencies(counts, flat)


def test_full_probability_one_is_always_full():
    config = menus()
    sampler = WidthSampler(config, 1.0)
    assert {sampler.draw() for _ in range(50)} == {config.full()}


@pytest.mark.parametrize(
    ("mlp", "heads", "pairs"),
    [
        ((1, 2, 3, 4), (1, 2, 3), [(1, 1), (2, 2), (3, 2), (4, 3)]),
        ((1, 2, 3, 4), (1, 2, 3, 4), [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ((4, 8), (1, 2, 3), [(4, 1), (8, 2), (8, 3)]),
        ((4, 8), (1,), [(4, 1), (8, 1)]),
        ((8,), (2,), [(8, 2)]),
    ],
)
def test_homogeneous_widths_keep_the_same_share(mlp, heads, pairs):
    config = menus(mlp, heads)
    alike = homogeneous(config)
    assert [(w.mlp[0], w.heads[0]) for w in alike] == pairs
    assert alike[-1] == config.full()
    for widths in alike:
        config.check(widths)
        assert len(set(widths.mlp)) == len(set(widths.heads)) == 1


def test_every_draw_is_in_the_menus():
    config = menus((3, 9, 10), (1, 4))
    sampler = WidthSampler(config)
    for _ in range(200):
        config.check(sampler.draw())


def test_state_resumes_the_sequence():
    one, other = WidthSampler(menus(), seed=5), WidthSampler(menus(), seed=6)
    for _ in range(7):
        one.draw()
    other.load_state_dict({k: v.clone() for k, v in one.state_dict().items()})
    assert [one.draw() for _ in range(20)] == [other.draw() for _ in range(20)]


def test_seeds_differ_and_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sequences = [tuple(WidthSampler(menus(), seed=s).draw() for _ in range(1)) for s in range(40)]
    assert len(set(sequences)) > 10
    assert torch.equal(before, torch.get_rng_state())
    sampler = WidthSampler(menus(), seed=0)
    first = [sampler.draw() for _ in range(10)]
    torch.manual_seed(1)
    sampler = WidthSampler(menus(), seed=0)
    assert first == [sampler.draw() for _ in range(10)]


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_impossible_probability_is_refused(probability):
    with pytest.raises(ValueError, match=r"full_probability must lie in \[0, 1\]"):
        WidthSampler(menus(), probability)


@pytest.mark.parametrize("full", [0.0, 0.3])
def test_given_networks_are_drawn_by_what_they_do_without_and_must_be_in_the_menus(full):
    config = menus()
    networks = (config.uniform(1, 0), config.uniform(0, 1), config.uniform(2, 2))
    sampler = WidthSampler(config, full, seed=4, networks=networks)
    counts = Counter((w.mlp, w.heads) for w in (sampler.draw() for _ in range(DRAWS)))
    without = [config.params(config.full()) - config.params(w) for w in networks]
    assert len(set(without)) == 3
    wanted = {(w.mlp, w.heads): (1 - full) * n / sum(without) for w, n in zip(networks, without, strict=True)}
    if full:
        wanted[config.full().mlp, config.full().heads] = full
    assert_frequencies(counts, wanted)
    with pytest.raises(ValueError, match=r"mlp\[0\] must be one of \[1, 2, 3, 4\], got 9"):
        WidthSampler(config, networks=[config.full(), Widths((9, 1, 1), (1, 1, 1))])
    assert WidthSampler(config, full, networks=[config.full()]).draw() == config.full()
