"""A loss that runs the head itself has the value and the gradients of a loss of the model's logits."""

from __future__ import annotations

import pytest
import torch
from nn.models import EVERY, row_model

from flextron.judge import objectives
from flextron.judge.objectives import imitation, next_token, weighted
from flextron.nn import make_elastic
from flextron.nn.headless import headless, plain_head

SCALED = ("granite", "cohere", "cohere2", "gemma2")  # by a number, or bounded by a tanh


def found(model, ids, teacher, head):
    """The loss, its terms and all gradients."""
    model.zero_grad()
    terms = [(0.5, next_token(ids)), (2.0, imitation(teacher, 2.0))]
    if head is None:
        x = model(input_ids=ids, use_cache=False).logits
    else:
        with headless(model, head):
            x = model(input_ids=ids, use_cache=False).logits
    loss, values = weighted(x, head, terms)
    loss.backward()
    return [loss.detach(), *values, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", [family for family in EVERY if family not in SCALED])
def test_the_loss_is_that_of_logits(family, monkeypatch):
    model = make_elastic(row_model(family)).double()
    ids, V = torch.randint(3, 20, (2, 7)), model.config.vocab_size
    teacher, head = torch.randn(2, 7, V, dtype=torch.float64), plain_head(model)
    before = vars(model.get_input_embeddings()).copy()
    wanted = found(model, ids, teacher, None)
    monkeypatch.setattr(objectives, "_HEAD_VALUES", 5 * V)  # three pieces, the last one short
    monkeypatch.setattr(objectives, "_HEAD_ROWS", V // 2 + 1)
    ours = found(model, ids, teacher, head)
    assert len(ours) == len(wanted) and all(g.layout is torch.strided for g in ours)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert vars(model.get_input_embeddings()) == before and "forward" not in vars(head)


@pytest.mark.parametrize("family", SCALED)
def test_a_head_whose_outputs_are_not_the_logits_is_left_to_the_model(family):
    assert plain_head(make_elastic(row_model(family))) is None


def test_a_head_with_a_hook_is_left_to_the_model():
    model = make_elastic(row_model("llama"))
    model.lm_head.register_forward_hook(lambda *_: None)
    assert plain_head(model) is None


def test_the_rows_of_a_tied_embedding_go_into_the_gradient_that_the_head_has_made(monkeypatch):
    model = make_elastic(row_model("llama", tie_word_embeddings=True))
    ids, weight = torch.randint(3, 20, (2, 7)), model.lm_head.weight
    assert model.get_input_embeddings().weight is weight
    made = []
    monkeypatch.setattr(torch, "zeros_like", lambda t, **_: made.append(t.shape) or t.new_zeros(t.shape))
    found(model, ids, torch.randn(2, 7, model.config.vocab_size), plain_head(model))
    assert weight.grad is not None and weight.shape not in made
