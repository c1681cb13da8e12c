"""The static router: interpolation between targets, independent noise, determinism at evaluation."""

import pytest
import torch

from flextron.nn.router import GumbelSampler, Logits, StaticRouter, anneal

TARGETS = (0.4, 0.6, 1.0)


@pytest.fixture
def router():
    return StaticRouter(5, (4, 3), TARGETS, hidden=16, seed=0)


def test_trained_targets_are_one_hot(router):
    assert torch.equal(router.encode(torch.tensor(TARGETS)), torch.eye(3))


def test_between_targets_the_encoding_is_the_line_that_joins_them(router):
    torch.testing.assert_close(router.encode(0.45), torch.tensor([0.75, 0.25, 0.0]))
    torch.testing.assert_close(router.encode(0.9), torch.tensor([0.0, 0.25, 0.75]))


def test_outside_the_targets_the_ends_are_taken(router):
    assert torch.equal(router.encode(0.1), torch.tensor([1.0, 0.0, 0.0]))


def test_logits_are_continuous_in_the_target(router):
    grid = torch.linspace(0.4, 1.0, 601)
    for axis in router(grid):
        assert axis.diff(dim=0).abs().max() < 0.02 * (axis.max() - axis.min())


def test_shapes_follow_the_target(router):
    assert [a.shape for a in router(0.5)] == [(5, 4), (5, 3)]
    assert [a.shape for a in router(torch.rand(2, 7))] == [(2, 7, 5, 4), (2, 7, 5, 3)]
    assert [a.shape for a in router.choose(torch.rand(7))] == [(7, 5), (7, 5)]


def test_evaluation_has_no_noise(router):
    first, torch_state = router.choose(0.7), torch.get_rng_state()
    GumbelSampler(3)(router(0.7), 1.0)
    for a, b in zip(first, router.choose(0.7), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch_state, torch.get_rng_state())  # nobody else's numbers were used


def test_the_seed_decides_the_weights():
    a, b, c = (StaticRouter(5, (4, 3), TARGETS, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.rows.weight, b.rows.weight)
    assert not torch.equal(a.rows.weight, c.rows.weight)


def test_draws_are_as_frequent_as_the_softmax_says():
    logits = torch.tensor([0.5, -1.0, 1.2, 0.0])
    n = 40_000
    for scale in (1.0, 2.0):
        drawn = GumbelSampler(0)(Logits(logits.expand(n, 1, 4), torch.zeros(n, 1, 1)), 0.3, scale).mlp.argmax(
            -1
        )
        found = torch.bincount(drawn.flatten(), minlength=4) / n
        # five standard deviations of a binomial share
        p = torch.softmax(scale * logits, 0)
        assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_noise_is_independent_between_axes_layers_and_rows():
    n, layers = 4000, 3
    p = GumbelSampler(0)(Logits(torch.zeros(n, layers, 2), torch.zeros(n, layers, 2)), 1.0)
    series = torch.cat([p.mlp[..., 0], p.heads[..., 0]], dim=1).T  # [2L, n]
    apart = torch.corrcoef(series) - torch.eye(2 * layers)
    assert apart.abs().max() < 5 / n**0.5
    next_row = torch.corrcoef(torch.stack([series[0, :-1], series[0, 1:]]))[0, 1]
    assert next_row.abs() < 5 / n**0.5


def test_samples_are_probabilities_with_gradients(router):
    p = GumbelSampler(0)(router(0.5), 0.5)
    for axis in p:
        torch.testing.assert_close(axis.sum(-1), torch.ones(5))
    p.mlp[:, 0].sum().backward()
    assert router.body.weight.grad.abs().sum() > 0


def test_low_temperature_is_nearly_a_choice():
    p = GumbelSampler(0)(Logits(torch.zeros(200, 1, 4), torch.zeros(200, 1, 2)), 0.01).mlp
    assert p.max(-1).values.mean() > 0.98


def test_annealing_ends_where_it_should():
    assert anneal(0, 100) == pytest.approx((1.0, 1.0))
    assert anneal(99, 100) == pytest.approx((0.05, 10.0))
    middle, scale = anneal(50, 101)
    assert (middle, scale) == pytest.approx((0.05**0.5, 5.5))


@pytest.mark.parametrize("targets", [(), (0.5, 0.4), (0.5, 0.5), (0.0, 1.0), (0.5, 1.1)])
def test_bad_targets_are_refused(targets):
    with pytest.raises(ValueError, match="StaticRouter: targets must ascend"):
        StaticRouter(2, (2, 2), targets)


def test_bad_sizes_and_temperatures_are_refused(router):
    with pytest.raises(ValueError, match="head_choices must be at least 1, got 0"):
        StaticRouter(2, (2, 0), TARGETS)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        GumbelSampler(0)(router(0.5), 0.0)
