"""Our own loop of generation gives, to the bit, what transformers' loop gives of the same model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from nn.models import small_model
from nn.test_elastic_model import elastic, mixed, tokens
from nn.test_policy import left_padded, routed, three, turned
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaForCausalLM, StoppingCriteria
from transformers.generation import LogitsProcessorList, MinPLogitsWarper

import flextron.nn.model as model_module
from flextron.nn import ElasticCache, make_elastic


@contextmanager
def loop_of(ours: bool, monkeypatch: Any):
    """How often our loop ran; never with ``ours=False``."""
    taken, sample = [], model_module.sample

    def counted(*args: Any) -> Any:
        taken.append(1)
        return sample(*args)

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "sample", counted)
        if not ours:
            patch.setattr(model_module, "is_plain", lambda *_: False)
        yield taken


def both(model: Any, monkeypatch: Any, *args: Any, **kwargs: Any) -> list[Any]:
    results = []
    for ours in (True, False):
        torch.manual_seed(5)
        with loop_of(ours, monkeypatch) as taken:
            results.append(model.generate(*args, pad_token_id=0, **kwargs))
        assert taken == ([1] if ours else [])
    return results


SETTINGS = {
    "greedy": dict(max_new_tokens=12, do_sample=False),
    "one": dict(max_new_tokens=1),
    "sampled": dict(max_new_tokens=12, do_sample=True, temperature=0.7, top_k=9, top_p=0.9),
    "several": dict(max_new_tokens=9, do_sample=True, num_return_sequences=2),
    "ended": dict(max_new_tokens=40, do_sample=True, eos_token_id=[3, 7, 11, 20, 30, 31]),
    "processed": dict(
        max_new_tokens=9,
        repetition_penalty=1.3,
        logits_processor=LogitsProcessorList([MinPLogitsWarper(0.1)]),
    ),
}


@pytest.mark.parametrize("dial", ["full", "mixed", "requests", "adaptive"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_tokens_are_those_of_transformers(settings, dial, monkeypatch):
    model = routed(elastic("qwen3", "3:1"))
    ids, mask = left_padded()
    if dial == "mixed":
        model.set_widths(mixed(model.elastic))
    elif dial == "requests":
        model.set_widths(three(model.elastic))
    elif dial == "adaptive":
        turned(model, 0.4, 0.6, 0.8)
    mine, theirs = both(model, monkeypatch, ids, attention_mask=mask, **SETTINGS[settings])
    assert torch.equal(mine, theirs)
    if settings == "ended":
        assert (mine[:, 9:] == 0).any() and len(mine[0]) > 9


@pytest.mark.parametrize("rope", [None, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}])
def test_past_the_tables_made_ahead(rope, monkeypatch):
    given = {} if rope is None else dict(rope_parameters=rope, max_position_embeddings=16)
    model = elastic(**given)
    assert model.model.rotary_emb.rope_type == ("dynamic" if rope else "default")
    model.generation_config.max_length = None
    assert torch.equal(*both(model, monkeypatch, tokens(T=7), max_new_tokens=140))


def test_what_a_dictionary_holds(monkeypatch):
    asked = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    mine, theirs = both(
        elastic(), monkeypatch, tokens(T=6), max_new_tokens=5, top_k=4, do_sample=True, **asked
    )
    assert mine.keys() == theirs.keys() and type(mine) is type(theirs)
    for name in ("scores", "logits"):
        assert len(mine[name]) == 5 and all(map(torch.equal, mine[name], theirs[name]))
    assert mine.cache.get_seq_length() == theirs.cache.get_seq_length() == 10


class Streamer:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Any) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


def test_a_streamer_sees_every_token(monkeypatch):
    seen = []
    for ours in (True, False):
        streamer = Streamer()
        with loop_of(ours, monkeypatch):
            elastic().generate(tokens(1, 5), max_new_tokens=4, pad_token_id=0, streamer=streamer)
        seen.append(streamer.seen)
    assert seen[0] == seen[1] and len(seen[0]) == 6


class Turns(StoppingCriteria):
    """Sets another budget after the third token, and sees a hook registered after the fifth."""

    def __init__(self, act: Any) -> None:
        self.act, self.calls = act, 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.calls += 1
        self.act(self.calls)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def budget_and_hook(model: Any, seen: list[int]) -> Callable[[int], None]:
    """For `Turns`: the smallest budget after the third token; a hook after the fifth, for two tokens."""
    handles: list[Any] = []

    def act(calls: int) -> None:
        if calls == 3:
            model.set_widths(model.elastic.smallest(), "all")
        if calls == 5:
            handles.append(model.register_forward_hook(lambda *_: seen.append(1)))
        if calls == 7:
            handles[0].remove()

    return act


def test_a_budget_or_a_hook_may_come_between_tokens(monkeypatch):
    model = elastic()
    ids, mask = left_padded()
    results, seen = [], []
    for ours in (True, False):
        model.set_widths(model.elastic.full(), "all")
        with loop_of(ours, monkeypatch):
            results.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=12,
                    pad_token_id=0,
                    stopping_criteria=[Turns(budget_and_hook(model, seen))],
                )
            )
        assert len(seen) == 2
        seen.clear()
    assert torch.equal(*results)


def test_a_budget_that_outgrows_the_cache_is_refused_between_tokens(monkeypatch):
    model = elastic()
    model.set_widths(model.elastic.smallest())

    def act(calls: int) -> None:
        if calls == 2:
            model.set_widths(model.elastic.full())

    with loop_of(True, monkeypatch) as taken, pytest.raises(ValueError, match="more key/value groups than"):
        model.generate(tokens(1, 5), max_new_tokens=6, pad_token_id=0, stopping_criteria=[Turns(act)])
    assert taken == [1]


def test_transformers_runs_where_ours_would_not_do(monkeypatch):
    model, ids = elastic(), tokens(2, 6)

    def taken(**kwargs: Any) -> list[int]:
        with loop_of(True, monkeypatch) as ran:
            model.generate(ids, max_new_tokens=3, pad_token_id=0, **kwargs)
        return ran

    assert taken() == [1]
    assert taken(num_beams=2) == []
    assert taken(use_cache=False) == []
    assert taken(prefill_chunk_size=2) == []
    assert taken(attention_mask=torch.ones(2, 8, dtype=torch.int64)) == []
    assert taken(return_dict_in_generate=True, output_hidden_states=True) == []
    cache = ElasticCache()
    assert taken(cache=cache) == [1]
    with torch.no_grad():
        model(ids[:, :3], cache=(filled := ElasticCache()))
    assert taken(cache=filled) == []


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_before_a_prompt_are_seen(kind):
    """PEFT puts them there by a method of its own in the place of one of the model's."""
    found = []
    ids, mask = left_padded()
    for model in (small_model(), elastic()):
        torch.manual_seed(2)
        wrapped = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
        settings = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        found.append(wrapped.generate(input_ids=ids, **settings))
        found.append(model.generate(ids, **settings))  # as it was
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


class Negative(LlamaForCausalLM):
    def forward(self, *, input_ids: Any = None, **kwargs: Any) -> Any:
        found = super().forward(input_ids, **kwargs)
        found.logits = -found.logits
        return found


class Called(LlamaForCausalLM):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(*args, **kwargs)
        found.logits = -found.logits
        return found


class Shifted(LlamaForCausalLM):
    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:
        found = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return found | {"input_ids": (found["input_ids"] + 1) % 61}


class Ended(LlamaForCausalLM):
    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        return super()._sample(*args, **kwargs)[:, :-1]


@pytest.mark.parametrize("kind", [Negative, Called, Shifted, Ended])
def test_what_a_class_of_ones_own_does_otherwise_is_done(kind):
    (ids, mask), models = left_padded(), [small_model(), small_model()]
    for model in models:
        model.__class__ = kind
    stock, model = models[0], make_elastic(models[1])
    settings = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = stock.generate(ids, **settings)
    assert not torch.equal(expected, small_model().generate(ids, **settings))
    assert torch.equal(model.generate(ids, **settings), expected)
    with torch.no_grad():
        logits = [m(input_ids=ids, attention_mask=mask).logits for m in (stock, model)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=2e-5)
