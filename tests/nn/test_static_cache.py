"""A cache that stays where it is gives the modules what an `ElasticCache` does, contiguous or in pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn.test_elastic_model import elastic, mixed, tokens
from nn.test_policy import left_padded

import flextron.nn.model as model_module
from flextron.nn import ElasticCache, StaticCache

PAGES = (None, 4)


def static_cache(model: Any, sequences: int = 3, room: int = 32, page: int | None = None) -> StaticCache:
    """Its pages, where it has some, belong to the sequences in no order."""
    cache = StaticCache(model, sequences, room, page)
    if page is not None:
        cache.table.copy_(torch.randperm(cache.table.numel()).view(cache.table.shape))
    return cache


@pytest.fixture
def by_modules(monkeypatch):
    """Forwards by the modules alone, as on a GPU."""
    monkeypatch.setattr(model_module, "try_forward", lambda *_: None)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("unit", ["kv_group", "query"])
@torch.no_grad()
def test_the_modules_read_what_they_stored(unit, page, by_modules):
    model, ids = elastic("qwen2", "3:1", unit), tokens(3, 16)
    model.set_widths(mixed(model.elastic))
    caches = ElasticCache(), static_cache(model, 4, 16, page)
    for begin, end in [(0, 7), (7, 8), (8, 12), (12, 13)]:
        ours, theirs = (model(ids[:, begin:end], cache=cache).logits for cache in reversed(caches))
        assert torch.equal(ours, theirs)
    order = torch.tensor([2, 0, 0])
    for cache in caches:
        cache.crop(-2)
        cache.reorder_cache(order)
    ours, theirs = (model(ids[order, 11:], cache=cache).logits for cache in reversed(caches))
    assert torch.equal(ours, theirs) and caches[1].get_seq_length() == 16
    caches[1].reset()
    assert torch.equal(model(ids, cache=caches[1]).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("page", PAGES)
@torch.no_grad()
def test_too_small_a_room_grows_and_keeps_what_it_holds(page, by_modules):
    model, ids = elastic(), tokens(2, 12)
    cache = static_cache(model, 2, 6, page)
    cache.steps["of the old room"] = None
    expected = model(ids, use_cache=False).logits
    ours = torch.cat([model(ids[:, :5], cache=cache).logits, model(ids[:, 5:], cache=cache).logits], 1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert cache.tokens == 256 and not cache.steps


@torch.no_grad()
def test_what_a_static_cache_cannot_do_is_refused():
    model = elastic()
    cache = static_cache(model, 2)
    with pytest.raises(ValueError, match="batch must be at most its 2 sequences, got 3"):
        model(tokens(3), cache=cache)
    with torch.enable_grad(), pytest.raises(ValueError, match="states must not need a gradient"):
        model(tokens(2), cache=cache)
    with pytest.raises(ValueError, match="page must be at least 1, got 0"):
        static_cache(model, page=0)
    with pytest.raises(NotImplementedError, match="repeats must be 1"):
        cache.batch_repeat_interleave(2)
    model.set_widths(model.elastic.smallest())
    model(tokens(2), cache=cache)
    model.set_widths(model.elastic.full())
    with pytest.raises(ValueError, match="more key/value groups than the cache holds"):
        model(tokens(2), cache=cache)


def test_hidden_tokens_of_a_prompt_may_come_last():
    """`generate` moves them before the visible ones, and back."""
    model, (ids, mask) = elastic(), left_padded()
    settings = dict(attention_mask=mask.flip(1), max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = model.generate(ids.flip(1), **settings)
    for page in PAGES:
        cache = static_cache(model, 4, page=page)
        assert torch.equal(model.generate(ids.flip(1), cache=cache, **settings), expected)
