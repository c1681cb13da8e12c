"""The surrogate: its inputs, its fit to a function it has not seen, and its own yardsticks."""

import random
from itertools import product

import pytest
import torch
from synthetic import SyntheticLoss, make_config, make_table

from flextron.config import Widths
from flextron.nn.router import Probabilities
from flextron.routing.fit import random_widths
from flextron.routing.search import one_hot, predicted_losses, search
from flextron.routing.surrogate import (
    ReplayBuffer,
    Surrogate,
    SurrogateFitter,
    fit_report,
    r2_score,
    spearman,
)

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
    surrogate = Surrogate(8, (4, 3), hidden=64)
    data = filled(250, seed=0).tensors()
    surrogate.start(*data)
    SurrogateFitter(surrogate, seed=0).fit(*data, steps=600)
    return surrogate


def test_it_learns_a_function_with_interactions(fitted):
    report = fit_report(fitted, *filled(80, seed=1).tensors())
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
    p = Probabilities(
        torch.full((8, 4), 0.25, requires_grad=True), torch.full((8, 3), 1 / 3, requires_grad=True)
    )
    fitted.loss(p, TABLE.expected(*p) / TABLE.full_ms).backward()
    assert all(axis.grad.abs().sum(-1).min() > 0 for axis in p)


def test_fitting_is_deterministic():
    def weights() -> torch.Tensor:
        surrogate, data = Surrogate(8, (4, 3), hidden=16, seed=5), filled(30, seed=0).tensors()
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


def test_search_is_no_worse_than_what_it_begins_with_and_repeats(fitted):
    """Even without a generation or a swap; and what is too slow to begin with is no answer."""
    start = [
        CONFIG.full(),
        *(
            w
            for w in (random_widths(CONFIG, random.Random(i)) for i in range(40))
            if TABLE.fraction(w) <= 0.6
        ),
    ]
    best = min(predicted_losses(CONFIG, TABLE, fitted, start[1:]).tolist())
    bare = search(CONFIG, TABLE, fitted, 0.6, start, generations=0, swaps=0)
    assert TABLE.fraction(bare) <= 0.6 * (1 + 1e-5)
    assert float(predicted_losses(CONFIG, TABLE, fitted, [bare])[0]) <= best + 1e-6
    assert search(CONFIG, TABLE, fitted, 0.6, start) == search(CONFIG, TABLE, fitted, 0.6, start)


def test_search_finds_the_best_there_is():
    """Where all configurations can be looked at."""
    config = make_config(layers=3, mlp_choices=(16, 32, 64), head_choices=(1, 3))
    table, loss = make_table(config), SyntheticLoss(config)
    every = [
        Widths(mlp, heads)
        for mlp in product(config.mlp_choices, repeat=3)
        for heads in product(config.head_choices, repeat=3)
    ]
    buffer = ReplayBuffer(config)
    for widths in every:
        buffer.add(widths, table.fraction(widths), loss(widths) - loss(config.full()))
    surrogate = Surrogate(3, (3, 2), hidden=16)
    surrogate.start(*buffer.tensors())
    predicted = predicted_losses(config, table, surrogate, every).tolist()
    for target in (0.6, 0.75, 0.9):
        found = search(config, table, surrogate, target)
        best = min(p for w, p in zip(every, predicted, strict=True) if table.fraction(w) <= target)
        assert float(predicted_losses(config, table, surrogate, [found])[0]) == pytest.approx(best, abs=1e-5)


def test_the_linear_start_is_worth_many_steps():
    """What `start` solves already ranks; the same surrogate without it knows nothing yet."""
    data, others = filled(120, seed=0).tensors(), filled(80, seed=1).tensors()
    surrogate = Surrogate(8, (4, 3), hidden=16)
    surrogate.start(*data)
    assert fit_report(surrogate, *others).r2 > 0.9
    nothing = Surrogate(8, (4, 3), hidden=16)
    nothing.scale.copy_(surrogate.scale)
    assert fit_report(nothing, *others).r2 < 0.1


def test_tokens_that_disagree_are_told_from_tokens_that_agree():
    """Mean widths alone cannot: half the tokens at 1 and half at 3 heads are on average as wide as all at 2.

    Its loss is that of the mean width and a price for every layer whose tokens differ.
    """
    generator = torch.Generator().manual_seed(0)

    def batch(n: int) -> ReplayBuffer:
        buffer = ReplayBuffer(CONFIG)
        for _ in range(n):
            logits = [torch.randn(8, c, generator=generator) for c in (4, 3)]
            sharp = 10 ** torch.rand(8, 1, generator=generator)
            shares = Probabilities(*((sharp * axis).softmax(-1) for axis in logits))
            price = sum(-(p * p.log()).sum() for p in shares).item()
            width = sum((p * torch.arange(p.shape[-1])).sum() for p in shares).item()
            buffer.add_shares(
                shares, TABLE.expected(*shares).item() / TABLE.full_ms, 0.02 * (40 - width) + 0.05 * price
            )
        return buffer

    data, others = batch(200).tensors(), batch(60).tensors()
    errors = {}
    for mixed in (False, True):
        surrogate = Surrogate(8, (4, 3), hidden=32, mixed=mixed)
        surrogate.start(*data)
        errors[mixed] = fit_report(surrogate, *others).mean_error
    assert errors[True] < 0.5 * errors[False]


def test_shares_must_be_about_the_menus():
    buffer = ReplayBuffer(CONFIG)
    with pytest.raises(ValueError, match=r"add_shares: heads must have shape \[8, 3\], got \[8, 2\]"):
        buffer.add_shares(Probabilities(torch.ones(8, 4), torch.ones(8, 2)), 0.5, 1.0)
    assert len(buffer) == 0


def test_search_names_the_fastest_when_there_is_none(fitted):
    with pytest.raises(ValueError, match=r"search: target must be at least 0\.\d+, got 0.1"):
        search(CONFIG, TABLE, fitted, 0.1)


def test_one_hot_says_what_was_chosen():
    p = one_hot(CONFIG, [CONFIG.full(), CONFIG.smallest()])
    assert p.mlp.argmax(-1).tolist() == [[3] * 8, [0] * 8]
    assert p.heads.argmax(-1).tolist() == [[2] * 8, [0] * 8]
