"""Continuations that share their beginnings: the log-likelihoods of each alone, and nothing computed twice."""

import pytest
import torch
from nn.models import small_model

from flextron.nn import make_elastic
from flextron_lab.prefixes import log_likelihoods

# contexts with several ends, with one, with ends of one token; one that is another's beginning, and some that are cut
PAIRS = [
    ([5, 6, 7, 8], [9, 10]),
    ([20, 21], [22]),
    ([5, 6, 7, 8], [9, 11, 12]),
    ([5, 6], [7]),
    ([5, 6, 7, 8], [13]),
    ([5, 6, 7, 8], [14]),
    ([5, 6], [7, 8, 13]),
    ([*range(30, 55)], [3, 4]),
    ([*range(30, 54)], [3, 4]),
    ([*range(30, 54)], [3]),
    ([*range(30, 54)], [4]),
    ([5, 6, 7, 8], [9, 10]),
]
LONGEST = 20


def alone(model, context, continuation):
    """By a forward pass of its own."""
    ids = torch.tensor((context + continuation)[-LONGEST - 1 :])
    with torch.no_grad():
        log_p = model(input_ids=ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
    n = len(continuation)
    rows, wanted = log_p[-n:], ids[-n:]
    return float(rows[range(n), wanted].sum()), bool((rows.argmax(-1) == wanted).all())


@pytest.mark.parametrize("kind", ["stock", "full", "narrow"])
def test_each_continuation_has_the_likelihood_that_it_has_alone(kind):
    model = small_model().eval()
    greedy = int(model(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].argmax())
    pairs = [*PAIRS, ([5, 6, 7, 8], [greedy])]
    if kind != "stock":
        model = make_elastic(model)
        model.set_budget(widths=model.elastic.full() if kind == "full" else model.elastic.smallest())
    found = log_likelihoods(model, pairs, LONGEST)
    wanted = [alone(model, *pair) for pair in pairs]
    assert [one for _, one in found] == [one for _, one in wanted]
    assert kind == "narrow" or found[-1][1]
    assert [one for one, _ in found] == pytest.approx([one for one, _ in wanted], abs=2e-5)


def test_what_is_shared_is_computed_once(monkeypatch):
    model, given = small_model().eval(), []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda input_ids, **o: given.append(input_ids.tolist()) or forward(input_ids, **o),
    )
    a, b = [5, 6, 7], [5, 6, 8, 9]
    log_likelihoods(model, [(a, [8, 9, 4]), (b, [3]), (a, [8]), (a, [4, 9]), (b, [2]), ([5, 6], [1])], 20)
    assert given == [[[5, 6]], [[5, 6, 7]], [[8, 9], [4, 0]], [[8, 9]]]


def test_a_cache_that_cannot_be_cut_is_not_used_again(monkeypatch):
    model = small_model().eval()
    wanted = [alone(model, *pair)[0] for pair in PAIRS]
    monkeypatch.setattr("transformers.cache_utils.DynamicLayer.is_croppable", False)
    monkeypatch.setattr("transformers.cache_utils.Cache.crop", None)
    assert [one for one, _ in log_likelihoods(model, PAIRS, LONGEST)] == pytest.approx(wanted, abs=2e-5)
