"""A sub-network drafts and the chosen one verifies: the same tokens, or the same distribution, from one cache."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from nn.models import small_model
from nn.test_elastic_model import elastic, mixed, tokens
from nn.test_generation import Streamer, Turns
from nn.test_policy import left_padded, routed, turned
from torch import Tensor
from transformers.generation import LogitsProcessorList, MinPLogitsWarper

import flextron.nn.drafting as drafting
from flextron.nn import ElasticCache, StaticCache, make_elastic, pack
from flextron.nn.drafting import Costs, Drafting, Length
from flextron.nn.forward import ElasticForward


def near(packed: str | None = "int8", **overrides: Any) -> Any:
    """A model whose layers add little, so that its sub-networks often agree with it."""
    model = small_model(**overrides)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 0.3
            layer.self_attn.o_proj.weight *= 0.3
    model = make_elastic(model)
    if packed != "plain":
        pack(model, packed)
    model.generation_config.eos_token_id = None
    return model


def both(model: Any, *args: Any, draft: Any = None, draft_tokens: Any = 2, **kwargs: Any) -> list[Any]:
    """What a generation returns without a draft and with one."""
    settings = dict(pad_token_id=0, do_sample=False, return_dict_in_generate=True) | kwargs
    draft = draft or model.elastic.smallest()
    return [
        model.generate(*args, **given, **settings)
        for given in ({}, dict(draft_budget=draft, draft_tokens=draft_tokens))
    ]


def assert_same(plain: Any, drafted: Any) -> None:
    assert torch.equal(plain.sequences, drafted.sequences)
    length = plain.cache.get_seq_length()
    assert drafted.cache.get_seq_length() == length
    for mine, theirs in zip(drafted.cache.layers, plain.cache.layers, strict=True):
        assert torch.equal(mine.keys[:, :length], theirs.keys[:, :length])
        assert torch.equal(mine.values[:, :length], theirs.values[:, :length])


SETTINGS = {
    "greedy": dict(max_new_tokens=23),
    "one": dict(max_new_tokens=1),
    "ended": dict(max_new_tokens=40, eos_token_id=[*range(3, 60, 4)], repetition_penalty=1.5),
    "processed": dict(
        max_new_tokens=15,
        repetition_penalty=1.3,
        logits_processor=LogitsProcessorList([MinPLogitsWarper(0.1)]),
    ),
    "watched": dict(max_new_tokens=9, output_scores=True, output_logits=True),
}


@pytest.mark.parametrize("budget", ["full", "mixed"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_greedy_tokens_and_the_cache_are_those_without_a_draft(settings, budget):
    model = near()
    ids, mask = left_padded()
    if budget == "mixed":
        model.set_widths(mixed(model.elastic))
    plain, drafted = both(model, ids, attention_mask=mask, **SETTINGS[settings])
    assert_same(plain, drafted)
    counts = drafted.drafted
    if settings == "greedy":
        assert counts.proposed > counts.accepted > 0 and counts.rounds < 22
    if settings == "ended":
        assert (drafted.sequences[:, 9:] == 0).any() and len(drafted.sequences[0]) > 12
    if settings == "watched":
        for name in ("scores", "logits"):
            assert len(plain[name]) == 9 and all(map(torch.equal, plain[name], drafted[name]))


@pytest.mark.parametrize("B", [1, 3, 5, 9])
@pytest.mark.parametrize("packed", ["plain", None, "int8"])
def test_all_formats_give_the_same_bits(packed, B):
    plain, drafted = both(near(packed), tokens(B, 6), max_new_tokens=60 // B, draft_tokens=8)
    assert torch.equal(plain.sequences, drafted.sequences)
    if B < 9:  # more rows of plain weights have other bits, with a draft or without
        assert_same(plain, drafted)
    assert (drafted.drafted.accepted > 0) == (packed != "plain" or B != 5)


def test_modules_draft_too(monkeypatch):
    model = near("plain")
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(ElasticForward, "__call__", lambda *_: pytest.fail("the decoder op ran"))
    ids, mask = left_padded()
    plain, drafted = both(model, ids, attention_mask=mask, max_new_tokens=15)
    assert torch.equal(plain.sequences, drafted.sequences)
    assert drafted.drafted.accepted > 0
    assert plain.cache.get_seq_length() == drafted.cache.get_seq_length()


def test_a_draft_that_is_always_right_loses_no_step():
    model = near()
    ids, mask = left_padded()
    _, drafted = both(
        model, ids, attention_mask=mask, draft=model.elastic.full(), draft_tokens=3, max_new_tokens=17
    )
    assert drafted.drafted == drafting.Drafted(rounds=4, proposed=36, accepted=36)  # 1 + 4 times 4 tokens


def test_sequences_that_are_ahead_keep_what_was_accepted():
    """Were it thrown away, the slowest of all would set the pace in every round anew."""
    model = near()
    ids, settings = tokens(8, 6), dict(max_new_tokens=40, draft_tokens=3)
    alone = [both(model, row[None], **settings)[1].drafted.rounds for row in ids]
    plain, drafted = both(model, ids, **settings)
    assert torch.equal(plain.sequences, drafted.sequences)
    assert max(alone) <= drafted.drafted.rounds < 39
    assert drafted.drafted.rounds < 1.35 * max(alone)


def test_one_cache_holds_what_both_write(monkeypatch):
    model, seen = near(), []
    begin = drafting.Networks.begin

    def watched(self: Any, B: int, count: int) -> None:
        begin(self, B, count)
        groups = [layer.keys.shape[2] for layer in self.view.layers]
        seen.append(
            (
                groups,
                all(
                    a.keys.data_ptr() == b.keys.data_ptr()
                    for a, b in zip(self.view.layers, self.cache.layers, strict=True)
                ),
            )
        )

    monkeypatch.setattr(drafting.Networks, "begin", watched)
    both(model, tokens(1, 6), max_new_tokens=90)
    assert len(seen) > 20
    assert all(shared and groups == [1, 1, 1] for groups, shared in seen)


@torch.no_grad()
@pytest.mark.parametrize("cached", [250, 315])
@pytest.mark.parametrize("kind", ["plain", "packed", "int8", "bfloat16", "windows"])
def test_tokens_have_the_same_bits_in_one_step_as_in_several(kind, cached):
    """Where the number of keys changes how they are split among threads, too."""
    family = dict(family="mistral", sliding_window=255) if kind == "windows" else {}
    model = small_model(max_position_embeddings=512, **family)
    model = make_elastic(model.bfloat16() if kind == "bfloat16" else model)
    if kind in ("packed", "int8"):
        pack(model, "int8" if kind == "int8" else None)
    ids, mask = torch.randint(1, 61, (1, cached + 8)), torch.ones(1, cached + 8, dtype=torch.int64)
    mask[:, :2] = 0
    logits = []
    for at_once in (8, 1):
        cache, found = ElasticCache(), []
        model(ids[:, :cached], attention_mask=mask[:, :cached], cache=cache)
        for begin in range(cached, cached + 8, at_once):
            end = begin + at_once
            positions = torch.arange(begin, end)[None]
            given = dict(attention_mask=mask[:, :end], position_ids=positions, cache=cache)
            found.append(model(ids[:, begin:end], **given).logits)
        logits.append(torch.cat(found, 1))
    assert torch.equal(*logits)


def distribution(model: Any, prompt: Tensor, length: int) -> Tensor:
    """The probability of every continuation of so many tokens, [vocabulary ** length]."""
    vocabulary = model.elastic.vocab_size
    rows = torch.tensor(list(product(range(vocabulary), repeat=length)))
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(rows), -1), rows], 1)).logits
    logs = logits[:, prompt.shape[1] - 1 : -1].log_softmax(-1)
    return logs.gather(2, rows[..., None]).sum((1, 2)).exp()


def excess(counts: Tensor, p: Tensor) -> float:
    """By how many standard deviations chi-square is above what p leads one to expect."""
    expected = p * counts.sum()
    common = expected >= 5
    counts, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, expected))
    freedom = len(counts) - 1
    return float(
        (((counts - expected) ** 2 / expected.clamp_min(1e-9)).sum() - freedom) / (2 * freedom) ** 0.5
    )


@pytest.mark.parametrize("rule", ["right", "keeps all", "no residual"])
def test_sampled_tokens_have_the_distribution_of_those_without_a_draft(rule, monkeypatch):
    if rule == "keeps all":
        monkeypatch.setattr(drafting, "accepted", lambda p, q, token: token)
    if rule == "no residual":
        keeps = lambda p, q, t: t if torch.rand(()) * q[t] < p[t] else int(torch.multinomial(p, 1))  # noqa: E731
        monkeypatch.setattr(drafting, "accepted", keeps)
    model = small_model(vocab_size=5)
    with torch.no_grad():
        model.lm_head.weight *= 2.0
    model = make_elastic(model)
    model.generation_config.eos_token_id = None
    prompt, vocabulary, length = torch.tensor([[1, 3, 2]]), 5, 3
    counts = torch.zeros(vocabulary**length)
    for seed in range(4):
        torch.manual_seed(seed)
        drawn = model.generate(
            prompt.expand(512, -1),
            max_new_tokens=length,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
            draft_budget=model.elastic.smallest(),
            draft_tokens=2,
        )
        places = (drawn[:, 3:] * vocabulary ** torch.arange(length - 1, -1, -1)).sum(1)
        counts += torch.bincount(places, minlength=len(counts))
    found = excess(counts, distribution(model, prompt, length))
    assert found < 4 if rule == "right" else found > 8, found


def test_a_seed_gives_the_same_tokens_again():
    model = near()
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(
            model.generate(
                tokens(2, 6),
                max_new_tokens=20,
                do_sample=True,
                pad_token_id=0,
                draft_budget=model.elastic.smallest(),
            )
        )
    assert torch.equal(*drawn)


def test_a_streamer_sees_every_token():
    model, streamer = near(), Streamer()
    plain, _ = both(model, tokens(1, 5), max_new_tokens=9)
    model.generate(
        tokens(1, 5),
        max_new_tokens=9,
        pad_token_id=0,
        streamer=streamer,
        draft_budget=model.elastic.smallest(),
    )
    assert streamer.seen[1:] == [[token] for token in plain.sequences[0, 5:].tolist()] + ["end"]


def test_a_budget_below_the_draft_ends_the_drafting():
    model, found = near(), []
    smallest = model.elastic.smallest()
    draft = replace(smallest, mlp=(model.elastic.mlp_choices[-1], *smallest.mlp[1:]))
    for given in ({}, dict(draft_budget=draft, draft_tokens=2)):
        model.set_widths(model.elastic.full())

        def act(calls: int) -> None:
            if calls == 9:
                model.set_widths(smallest)

        settings = dict(max_new_tokens=20, pad_token_id=0, stopping_criteria=[Turns(act)])
        found.append(model.generate(tokens(1, 5), return_dict_in_generate=True, **settings, **given))
    assert torch.equal(
        found[0].sequences[:, :14], found[1].sequences[:, :14]
    )  # a round's other tokens were known
    assert found[1].drafted.proposed < 20 and found[1].sequences.shape == (1, 25)


def length(costs: Costs, B: int = 1, is_timed: bool = False, fixed: int | None = None) -> Length:
    return Length(Drafting(None, fixed, lambda _: costs), B, is_timed)  # type: ignore[arg-type]


def test_drafts_are_as_long_as_pays():
    cheap = length(Costs(0.2))
    believed = cheap.next(100)
    assert 3 <= believed <= drafting.MOST and cheap.next(3) <= 2 and cheap.next(1) == 0
    for _ in range(30):
        cheap.saw(believed, believed, believed, 1.0)
    assert cheap.next(100) == drafting.MOST
    for _ in range(60):
        cheap.saw(1, 3, 0, 1.0)
    assert cheap.next(100) == 0
    for _ in range(200):
        cheap.saw(0, 0, 0, 1.0)
    assert cheap.next(100) > 0  # what was seen is forgotten
    assert length(Costs(0.9)).next(100) == 0
    assert length(Costs(0.4, (1.0, 1.5, 2.0, 2.5))).next(100) == 0
    assert length(Costs(0.2), B=8).next(100) < believed
    assert length(Costs(0.9), fixed=3).next(100) == 3


def test_measured_steps_correct_the_costs():
    timed = length(Costs(0.2), is_timed=True)
    first = timed.next(100)
    timed.saw(first, first, first, 1 + 0.2 * first)
    assert timed.next(100) == 0  # the second round tells what a draft must beat
    timed.saw(0, 0, 0, 0.3)
    for _ in range(20):  # a third of what the costs say
        k = timed.next(100)
        timed.saw(k, k, k, 1 + 0.2 * k if k else 0.3)
        if k == 0:
            break
    else:
        assert timed.acceptance > 0.9  # all was right, and a round of 8 still pays
        assert k == drafting.MOST


def refusals(model: Any) -> list[tuple[dict[str, Any], str]]:
    smallest, full = model.elastic.smallest(), model.elastic.full()
    filled = ElasticCache()
    with torch.no_grad():
        model(tokens(1, 3), cache=filled)
    return [
        (dict(draft_tokens=2), "draft_tokens must be given with a draft_budget"),
        (dict(draft_budget=smallest, draft_tokens=0), "draft_tokens must be at least 1 and at most 8, got 0"),
        (dict(draft_budget=smallest, draft_tokens="some"), "draft_tokens must be a whole number, got 'some'"),
        (
            dict(draft_budget=full, budget=smallest),
            "draft_budget must be within the budget that it drafts for",
        ),
        (
            dict(draft_budget=[smallest, full]),
            "must be one static budget and draft for one, got one for each",
        ),
        (dict(draft_budget=smallest, budget=[smallest, full]), "draft for one, got one for each request"),
        (dict(draft_budget=smallest, num_beams=2), "greedy or sampled generation, got beam search"),
        (dict(draft_budget=smallest, use_cache=False), "with a cache, got use_cache=False"),
        (dict(draft_budget=smallest, cache=filled), "an empty cache, got one of 3 tokens"),
        (dict(draft_budget=smallest, cache=StaticCache(model, 1, 40)), "an ElasticCache, got StaticCache"),
        (dict(draft_budget=smallest, custom_generate=lambda *_: None), "without custom_generate"),
        (dict(draft_budget=smallest, prefill_chunk_size=2), "a prompt of tokens, their mask"),
        (dict(draft_budget=0.5), "draft_budget needs a planner|fraction needs a planner"),
    ]


@pytest.mark.parametrize("case", range(13))
def test_what_a_draft_does_not_do_is_refused_in_a_sentence(case):
    model = elastic()
    given, sentence = refusals(model)[case]
    before = model.settings.now()
    with pytest.raises(ValueError, match=f"^(generate|set_budget): .*{sentence}"):
        model.generate(tokens(1, 4), max_new_tokens=4, pad_token_id=0, **given)
    assert model.settings.now() is before and drafting.drafting_now() is None


def test_adaptive_budgets_and_changing_tables_are_refused():
    model = routed(elastic())
    smallest = model.elastic.smallest()
    turned(model, 0.5)
    with pytest.raises(ValueError, match="must be one static budget and draft for one, got an adaptive one"):
        model.generate(tokens(1, 4), max_new_tokens=4, pad_token_id=0, draft_budget=smallest)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = elastic(rope_parameters=rope, max_position_embeddings=16)
    with pytest.raises(ValueError, match="tables that do not depend on the length, got rope_type 'dynamic'"):
        model.generate(tokens(1, 4), max_new_tokens=4, pad_token_id=0, draft_budget=smallest)
