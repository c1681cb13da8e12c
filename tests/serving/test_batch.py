"""A host's batch: who is where, and layers that give each request what it would get alone."""

from __future__ import annotations

import random

import pytest
import torch
from nn.models import small_model
from torch.nn.functional import scaled_dot_product_attention

from flextron import Widths, make_elastic
from flextron.nn import ElasticCache, elastic_config
from flextron.serving.batch import Batch
from flextron.serving.pace import Request

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return make_elastic(small_model(num_hidden_layers=2))


def random_widths(config, draw: random.Random) -> Widths:
    """Any widths of the menus, layer by layer."""
    return Widths(*(tuple(draw.choice(a.menu) for _ in range(config.num_layers)) for a in config.axes))


def test_places_follow_what_a_host_says(model):
    """Against a list that is changed in the plain way."""
    draw, config = random.Random(0), model.elastic
    batch, truth = Batch(config, CPU), {}
    for _ in range(200):
        removed = [place for place in truth if draw.random() < 0.2]
        for place in removed:
            del truth[place]
        free = [place for place in range(6) if place not in truth and draw.random() < 0.4]
        added = [(place, Request(random_widths(config, draw))) for place in free]
        truth |= dict(added)
        moved = []
        for _ in range(draw.randrange(3)):
            start, end = draw.sample(range(6), 2)
            if start not in truth:
                continue
            swapped = end in truth
            moved.append((start, end, swapped))
            there = truth.pop(end, None)
            truth[end] = truth.pop(start)
            if there is not None:
                truth[start] = there
        batch.update(removed, added, moved)
        assert batch._requests == truth


def test_a_place_is_taken_over_by_who_comes(model):
    batch, (one, other) = Batch(model.elastic, CPU), (model.elastic.full(), model.elastic.smallest())
    batch.update([], [(0, Request(one))], [])
    batch.update([0], [(0, Request(other))], [])
    assert batch.setting([3], 3).widths == other


class Host:
    """A host's attention in the plain way: the keys and values of each request, with NaN where none were stored."""

    def __init__(self, scaling: float, requests: int) -> None:
        self.scaling, self.lengths = scaling, [0] * requests
        self.stored = [[torch.empty(0), torch.empty(0)] for _ in range(requests)]

    def __call__(self, q, k, v, used):
        parts = zip(*(x[0].split(self.lengths) for x in (q, k, v)), self.stored, strict=True)
        return torch.cat([self.attend(*part, used) for part in parts])

    def attend(self, q, k, v, stored, used):
        """q [T, H, D] over the first groups of k and v [T, G, D] of one request -> [T, H, D]."""
        for i, new in enumerate((k, v)):
            old, groups = stored[i], new.shape[1]
            if len(old) and old.shape[1] < groups:
                missing = old.new_full((len(old), groups - old.shape[1], old.shape[2]), torch.nan)
                old = torch.cat([old, missing], 1)
            stored[i] = torch.cat([old[:, :groups], new]) if len(old) else new
        if not q.shape[1]:
            return q
        T, S, each = len(q), len(stored[0]), q.shape[1] // used
        keys, values = (x[:, :used].repeat_interleave(each, 1).transpose(0, 1) for x in stored)
        seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        out = scaled_dot_product_attention(q.transpose(0, 1), keys, values, seen, scale=self.scaling)
        return out.transpose(0, 1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_mixed_requests_get_what_each_gets_alone(family):
    """Prompts and then more tokens of requests whose widths differ in every layer, in one row."""
    hosted, alone = (make_elastic(small_model(family, num_hidden_layers=2)) for _ in range(2))
    draw, config = random.Random(1), hosted.elastic
    widths = [random_widths(config, draw) for _ in range(4)] + [config.full(), config.smallest()]
    batch, caches, done = Batch(config, CPU), [ElasticCache() for _ in widths], [0] * len(widths)
    batch.update([], enumerate(map(Request, widths)), [])
    hosts = []
    for attention, _ in hosted.layers_of():
        attention.host = Host(attention.scaling, len(widths))
        hosts.append(attention.host)
    hides_nothing = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    for lengths in ([3, 5, 1, 4, 2, 3], [1, 2, 1, 3, 1, 1]):
        ids = [torch.randint(61, (1, n)) for n in lengths]
        places = torch.cat([torch.arange(d, d + n) for d, n in zip(done, lengths, strict=True)])
        for host in hosts:
            host.lengths = lengths
        given = {
            "input_ids": torch.cat(ids, 1),
            "position_ids": places[None],
            "attention_mask": hides_nothing,
        }
        with torch.no_grad(), hosted.settings.block(batch.setting(lengths, sum(lengths))):
            hidden = hosted.base_model(**given, use_cache=False).last_hidden_state
            rows = hosted.lm_head(hidden)[0].split(lengths)
        for own, cache, part, logits in zip(widths, caches, ids, rows, strict=True):
            with torch.no_grad(), alone.budget(widths=own):
                expected = alone(part, cache=cache).logits[0]
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
        done = [d + n for d, n in zip(done, lengths, strict=True)]


def test_widths_that_move_between_steps_find_their_keys_in_the_cache():
    """A request with a deadline, beside one with a budget: what it gets is what it gets alone where all is cached."""
    hosted, alone = (
        make_elastic(plain, elastic_config(plain, "kv_group", (0, 20, 40), (0, 1, 2, 4)))
        for plain in (small_model(num_hidden_layers=2) for _ in range(2))
    )
    config, batch = hosted.elastic, Batch(hosted.elastic, CPU)
    moving, other = Request(config.full(), end=0.0), Request(config.smallest())
    batch.update([], [(0, other), (1, moving)], [])
    for attention, _ in hosted.layers_of():
        attention.host = Host(attention.scaling, 2)
    cache, done = ElasticCache(), 0
    steps = [((1, 2), 5), ((0, 0), 1), ((4, 0), 1), ((0, 1), 2), ((4, 4), 1)]
    for heads, n in steps:
        moving.widths = Widths((20, 40), heads)
        ids, lengths = torch.randint(61, (1, 1 + n)), [1, n]
        for attention, _ in hosted.layers_of():
            attention.host.lengths = lengths
        given = {
            "input_ids": ids,
            "position_ids": torch.tensor([[done, *range(done, done + n)]]),
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.int64),
        }
        with torch.no_grad(), hosted.settings.block(batch.setting(lengths, 1 + n)):
            hidden = hosted.base_model(**given, use_cache=False).last_hidden_state
            logits = hosted.lm_head(hidden)[0, 1:]
        with torch.no_grad(), alone.budget(widths=moving.widths, kv="all"):
            expected = alone(ids[:, 1:], cache=cache).logits[0]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
        done += n


def test_padding_keeps_as_little_as_can_be(model):
    config = model.elastic
    batch = Batch(config, CPU)
    batch.update([], [(0, Request(config.full()))], [])
    padded = batch.setting([2], 5)
    assert padded.widths == config.full() and padded.policy is not None
    extents = padded.policy(torch.zeros(1, 5, 1), 0)
    assert extents.mlp.extent.tolist() == [config.full().mlp[0]] * 2 + [config.smallest().mlp[0]] * 3
    assert batch.setting([2], 2).policy is None  # all alike: no extents are needed
    assert batch.setting([2], 2) is batch.setting([2], 2)
