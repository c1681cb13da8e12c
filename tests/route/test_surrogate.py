"""The surrogate: its inputs, its fit to a function it has not seen, and its own yardsticks."""

import random

import pytest
import torch
from synthetic import SyntheticLoss, make_config, make_table

from flextron.nn.router import Choices
from flextron.route.latency import random_widths
from flextron.route.search import one_hot, predicted_losses, search
from flextron.route.surrogate import ReplayBuffer, Surrogate, SurrogateFitter, judge, r2_score, spearman

CONFIG = make_config(layers=8)
TABLE = make_table(CONFIG)
LOSS = SyntheticLoss(CONFIG)


def filled(n: int, seed: int) -> ReplayBuffer:
    rng, buffer, full = random.Random(seed), ReplayBuffer(CONFIG), LOSS(CONFIG.full())
    while len(buffer) < n:
        widths = random_widths(CONFIG, rng)
        if widths not in buffer:
            buffer.add(widths, TABLE.fraction(widths), LOSS(widths) - full)
    return buffer


@pytest.fixture(scope="module")
def fitted() -> Surrogate:
    surrogate = Surrogate(8, 4, 3, hidden=64)
    data = filled(250, seed=0).tensors()
    surrogate.standardise(data[2])
    SurrogateFitter(surrogate, seed=0).fit(*data, steps=600)
    return surrogate


def test_it_learns_a_function_with_interactions(fitted):
    report = judge(fitted, *filled(80, seed=1).tensors())
    assert report.n == 80
    assert report.r2 > 0.9
    assert report.rank > 0.95
    assert report.mean_error < report.worst_error


def test_it_tells_networks_of_one_size_apart(fitted):
    """A surrogate that knows nothing but the size also ranks well over all sizes; a router needs more."""
    rng = random.Random(2)
    near = [w for w in (random_widths(CONFIG, rng) for _ in range(3000)) if 0.68 < TABLE.fraction(w) < 0.72]
    observed = [LOSS(w) for w in near]
    predicted = predicted_losses(CONFIG, TABLE, fitted, near).tolist()
    assert len(near) > 50
    assert spearman(predicted, observed) > 0.9


def test_the_full_model_loses_nothing(fitted):
    assert float(predicted_losses(CONFIG, TABLE, fitted, [CONFIG.full()])[0]) == 0.0


def test_targets_are_what_forward_predicts_and_loss_is_their_inverse(fitted):
    choices, fractions, _ = filled(10, seed=3).tensors()
    nats = fitted.loss(choices, fractions)
    torch.testing.assert_close(fitted.target(nats), fitted(choices, fractions))


def test_gradients_reach_the_probabilities(fitted):
    p = Choices(torch.full((8, 4), 0.25, requires_grad=True), torch.full((8, 3), 1 / 3, requires_grad=True))
    fitted.loss(p, TABLE.expected(*p) / TABLE.full_ms).backward()
    assert all(axis.grad.abs().sum(-1).min() > 0 for axis in p)


def test_fitting_is_deterministic():
    def weights() -> torch.Tensor:
        surrogate, data = Surrogate(8, 4, 3, hidden=16, seed=5), filled(30, seed=0).tensors()
        SurrogateFitter(surrogate, seed=1).fit(*data, steps=20)
        return torch.cat([p.flatten() for p in surrogate.parameters()])

    assert torch.equal(weights(), weights())


def test_the_buffer_refuses_what_it_has():
    buffer = filled(3, seed=0)
    rng = random.Random(0)
    known = next(w for w in (random_widths(CONFIG, rng) for _ in range(9)) if w in buffer)
    with pytest.raises(ValueError, match="widths must be new"):
        buffer.add(known, 0.5, 1.0)


def test_rank_correlation_shares_tied_ranks():
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)
    assert spearman([1, 1], [1, 2]) == 0


def test_r2_of_the_mean_is_zero():
    y = torch.tensor([1.0, 2.0, 3.0])
    assert r2_score(torch.full((3,), 2.0), y) == 0
    assert r2_score(y, y) == 1


def test_search_meets_the_target_and_beats_random(fitted):
    rng = random.Random(4)
    for target in (0.5, 0.7, 0.9):
        found = search(CONFIG, TABLE, fitted, target)
        assert TABLE.fraction(found) <= target * (1 + 1e-8)
        others = [w for w in (random_widths(CONFIG, rng) for _ in range(500)) if TABLE.fraction(w) <= target]
        best = min(predicted_losses(CONFIG, TABLE, fitted, others).tolist())
        assert float(predicted_losses(CONFIG, TABLE, fitted, [found])[0]) < best


def test_search_names_the_fastest_when_there_is_none(fitted):
    with pytest.raises(ValueError, match=r"search: target must be at least 0\.\d+, got 0.1"):
        search(CONFIG, TABLE, fitted, 0.1)


def test_one_hot_says_what_was_chosen():
    p = one_hot(CONFIG, [CONFIG.full(), CONFIG.smallest()])
    assert p.mlp.argmax(-1).tolist() == [[3] * 8, [0] * 8]
    assert p.heads.argmax(-1).tolist() == [[2] * 8, [0] * 8]
