"""Promises of the evaluation: the plain loss of each sub-network, and a model that is left as it was."""

from __future__ import annotations

import pytest
import torch
from training import tiny_run

from flextron.config import Widths
from flextron.data import windows
from flextron.judge.loss import divergence, evaluate


@pytest.fixture
def tokens():
    return windows(tiny_run.tokens(), 7, 12)


def test_full_width_is_the_loss_of_the_parent(tokens):
    with torch.no_grad():
        expected = tiny_run.parent()(input_ids=tokens, labels=tokens).loss
    (loss,) = evaluate(tiny_run.elastic(), tokens, [tiny_run.elastic().elastic.full()])
    assert loss == pytest.approx(float(expected), rel=1e-6)


def test_each_loss_is_that_of_its_widths(tokens):
    model = tiny_run.elastic()
    choices = [model.elastic.smallest(), Widths((8, 24), (2, 1)), model.elastic.full()]
    losses = evaluate(model, tokens, choices)
    assert len(set(losses)) == 3
    for widths, loss in zip(choices, losses, strict=True):
        model.set_widths(widths)
        with torch.no_grad():
            expected = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        assert loss == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batch_size_does_not_matter(tokens, batch_size):
    model = tiny_run.elastic()
    widths = [model.elastic.smallest()]
    assert evaluate(model, tokens, widths, batch_size) == pytest.approx(
        evaluate(model, tokens, widths, 7), rel=1e-6
    )


def test_model_is_left_as_it_was(tokens):
    model = tiny_run.elastic().train()
    before = Widths((16, 8), (1, 2))
    model.set_widths(before, kv="all")
    evaluate(model, tokens, [model.elastic.full()])
    assert (model.widths, model.kv, model.training) == (before, "all", True)
    with pytest.raises(ValueError, match="mlp"):
        evaluate(model, tokens, [model.elastic.smallest(), Widths((7, 7), (1, 1))])
    assert (model.widths, model.kv, model.training) == (before, "all", True)
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_is_without_noise(tokens):
    model = tiny_run.elastic().train()
    noisy = torch.nn.functional.dropout
    model.model.embed_tokens.register_forward_hook(lambda module, _, x: noisy(x, 0.5, module.training))
    state = torch.get_rng_state()
    full = [model.elastic.full()]
    assert evaluate(model, tokens, full) == evaluate(model, tokens, full)
    assert torch.equal(state, torch.get_rng_state())


def test_bad_arguments_are_named(tokens):
    model = tiny_run.elastic()
    with pytest.raises(ValueError, match=r"tokens must have shape \[n >= 1, length >= 2\], got \[84\]"):
        evaluate(model, tokens.flatten(), [model.elastic.full()])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(model, tokens, [model.elastic.full()], batch_size=0)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_a_divergence_is_kl_from_the_full_network(tokens, batch_size):
    model = tiny_run.elastic()
    found = divergence(model, tokens, batch_size)

    def predicted(widths):
        model.set_widths(widths)
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)

    full = predicted(model.elastic.full())
    assert found(model.elastic.full()) == pytest.approx(0, abs=1e-6)
    for widths in (model.elastic.smallest(), Widths((8, 24), (2, 1))):
        expected = float((full.exp() * (full - predicted(widths))).sum(-1).mean())
        before = model.dial
        assert expected > 1e-4 and found(widths) == pytest.approx(expected, rel=1e-4)
        assert model.dial == before
    with torch.no_grad():  # what it diverges from is the network of then
        model.lm_head.weight.mul_(2)
    assert found(model.elastic.full()) > 1e-4
