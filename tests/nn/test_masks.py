"""Under every mask that transformers takes we give its logits and tokens; at fewer widths, the extracted model's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from nn.models import small_model
from nn.test_elastic_model import elastic, mixed, tokens
from nn.test_forward import counted
from nn.test_policy import routed, three, turned
from torch import Tensor

import flextron
from flextron.nn import ElasticCache
from flextron.nn.masks import is_left_padded

B, T = 3, 9
GREEDY = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)


def rows(*texts: str) -> Tensor:
    return torch.tensor([[int(c) for c in text] for text in texts])


# What each token of each sequence is: seen or hidden.
PATTERNS = {
    "all": rows("111111111", "111111111", "111111111"),
    "left": rows("111111111", "000011111", "001111111"),
    "right": rows("111111111", "111110000", "111111100"),
    "both sides": rows("011111111", "000111000", "111111110"),
    "holes": rows("111011111", "101010101", "110000111"),
    "everything": rows("001101100", "111111111", "000000001"),
    "nobody": rows("111111111", "000000000", "111110000"),
}
DTYPES = {"int64": torch.int64, "bool": torch.bool, "float": torch.float32, "int32": torch.int32}


def forward(model: Any, ids: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False, **kwargs).logits


def cached(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    past, parts = None, []
    with torch.no_grad():
        for a, b in ((0, 4), (4, 5), (5, 9)):
            out = model(ids[:, a:b], attention_mask=mask[:, :b], cache=past, use_cache=True)
            past = out.cache
            parts.append(out.logits)
    return torch.cat(parts, 1)


def generation(**settings: Any) -> Callable[..., Tensor]:
    def run(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
        torch.manual_seed(3)
        return model.generate(ids, attention_mask=mask, **GREEDY | settings)

    return run


def hidden(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    asked = dict(output_hidden_states=True, return_dict_in_generate=True, output_logits=True)
    return torch.stack(model.generate(ids, attention_mask=mask, **GREEDY | asked).logits, 1)


def assisted(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    rows = [(ids[i : i + 1], mask[i : i + 1]) for i in (0, 2)]  # transformers takes one sequence at a time
    found = [model.generate(x, attention_mask=m, assistant_model=draft(), **GREEDY) for x, m in rows]
    return torch.cat(found)


@cache
def draft() -> Any:
    return small_model(seed=1, num_hidden_layers=1)


WAYS = {
    "forward": forward,
    "forward with a cache": cached,
    "greedy": generation(),
    "sampled": generation(do_sample=True, temperature=0.8, num_return_sequences=2),
    "beams": generation(num_beams=3),
    "without a cache": generation(use_cache=False),
    "embeddings": lambda model, ids, mask: model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, **GREEDY
    ),
    "in chunks": generation(prefill_chunk_size=4),
    "hidden states": hidden,
    "assisted": assisted,
}


@cache
def pair(width: str, unit: str = "kv_group") -> tuple[Any, Any]:
    """Ours, and the stock model that it must agree with."""
    model = elastic("llama", "2:1", unit)
    if width == "full":
        return model, small_model("llama", "2:1")
    model.set_widths(mixed(model.elastic))
    return model, flextron.extract(model)


def agree(ours: Tensor, exact: Tensor) -> None:
    if ours.is_floating_point():
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=2e-5)
    else:
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("width", ["full", "reduced"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("way", WAYS)
def test_a_padding_mask_gives_what_stock_gives(way, pattern, width):
    (model, stock), ids, mask = pair(width), tokens(B, T), PATTERNS[pattern]
    agree(WAYS[way](model, ids, mask), WAYS[way](stock, ids, mask))


@pytest.mark.parametrize("unit", ["kv_group", "query"])
@pytest.mark.parametrize("way", ["forward with a cache", "greedy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_may_be_of_any_dtype(dtype, way, unit):
    (model, stock), ids = pair("reduced", unit), tokens(B, T)
    for pattern in ("left", "everything"):
        mask = PATTERNS[pattern].to(DTYPES[dtype])
        agree(WAYS[way](model, ids, mask), WAYS[way](stock, ids, mask))


def of_four_dimensions() -> dict[str, Tensor]:
    causal = torch.ones(T, T).tril().bool()
    holes = causal & PATTERNS["everything"].bool()[:, None, None, :]
    prefix = causal | (torch.arange(T) < 4)
    random = torch.rand(B, 8, T, T, generator=torch.Generator().manual_seed(2))
    return {
        "boolean": holes,
        "additive": torch.where(holes, 0.0, torch.finfo(torch.float32).min),
        "shared": prefix[None, None],
        "of each head": random > 0.4,
        "a bias of each head": torch.where(causal, random, -1e9),
    }


@pytest.mark.parametrize("name", of_four_dimensions())
def test_a_mask_of_four_dimensions_gives_what_stock_gives(name):
    mask, ids = of_four_dimensions()[name], tokens(B, T)
    model, stock = pair("full")
    agree(forward(model, ids, mask), forward(stock, ids, mask))
    for unit in ("kv_group", "query"):
        model = elastic("llama", "2:1", unit)
        # one group of two heads, or one head of each of four groups
        model.set_widths(model.elastic.uniform(1, 0))
        own = mask if mask.shape[1] == 1 else mask[:, :2] if unit == "kv_group" else mask[:, ::2]
        agree(forward(model, ids, mask), forward(flextron.extract(model), ids, own))


def test_masks_go_together_with_every_dial():
    """Requests and tokens at widths of their own see what each sequence alone sees."""
    model, ids, mask = routed(elastic("qwen3", "3:1")), tokens(B, T), PATTERNS["everything"]
    for turn in (lambda: model.set_widths(three(model.elastic)), lambda: turned(model, 0.4, 0.6, 0.8)):
        turn()
        together, dial = forward(model, ids, mask), model.dial
        tokens_of = model.generate(ids, attention_mask=mask, **GREEDY)
        for i in range(B):
            model.turn(
                type(dial)(dial.widths[i : i + 1], dial.kv)
                if len(dial.widths) > 1
                else type(dial)(dial.widths, dial.kv, dial.targets[i : i + 1])
            )
            row = slice(i, i + 1)
            agree(together[row], forward(model, ids[row], mask[row]))
            agree(tokens_of[row], model.generate(ids[row], attention_mask=mask[row], **GREEDY))


@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize("hidden", [0, 2])
def test_a_mask_may_be_longer_than_a_prompt(hidden, way):
    (model, stock), ids, mask = pair("full"), tokens(B, T), torch.ones(B, T + 3, dtype=torch.int64)
    mask[1, :hidden] = 0
    agree(WAYS[way](model, ids, mask), WAYS[way](stock, ids, mask))


@pytest.mark.parametrize("width", ["full", "reduced"])
def test_positions_may_be_given(width):
    (model, stock), ids = pair(width), tokens(B, T)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]]).expand(B, -1)
    far = torch.tensor([5, 7, 8, 20, 21, 22, 23, 24, 40])[None].expand(B, -1)
    for positions in (packed, far, packed[:1]):
        for mask in (None, PATTERNS["all"], PATTERNS["left"], PATTERNS["holes"]):
            agree(
                forward(model, ids, mask, position_ids=positions),
                forward(stock, ids, mask, position_ids=positions),
            )


def test_a_mask_may_be_shorter_or_longer_than_the_keys():
    (model, stock), ids, found = pair("full"), tokens(B, T), []
    for m in (model, stock):
        with torch.no_grad():
            past = m(ids[:, :6], attention_mask=PATTERNS["left"][:, :6], use_cache=True).cache
            short = m(ids[:, 6:8], attention_mask=PATTERNS["left"][:, :7], cache=past).logits
            longer = torch.cat([PATTERNS["left"], PATTERNS["right"]], 1)
            found.append(torch.cat([short, m(ids[:, 8:], attention_mask=longer, cache=past).logits], 1))
    agree(*found)


@pytest.mark.parametrize("way", ["greedy", "sampled", "beams"])
@pytest.mark.parametrize("width", ["full", "reduced"])
def test_a_padding_token_inside_a_prompt_is_hidden(width, way):
    model, stock = pair(width)
    ids = tokens(B, T) * PATTERNS["everything"]
    assert (ids == 0).any()
    agree(WAYS[way](model, ids, None), WAYS[way](stock, ids, None))


def test_gradients_go_through_every_mask():
    model, stock = elastic("llama", "2:1"), small_model("llama", "2:1")
    ids, mask = tokens(B, T), PATTERNS["everything"]
    labels = ids.where(mask.bool(), -100)
    for m in (model, stock):
        m(ids, attention_mask=mask, labels=labels).loss.backward()
    for (name, p), q in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_masks_compile():
    model, stock = elastic(num_hidden_layers=1), small_model(num_hidden_layers=1)
    compiled, ids = torch.compile(model, backend="aot_eager", fullgraph=True), tokens(B, T)
    found = [forward(compiled, ids, PATTERNS[pattern]) for pattern in ("left", "everything")]
    torch._dynamo.reset()
    for pattern, logits in zip(("left", "everything"), found, strict=True):
        agree(logits, forward(stock, ids, PATTERNS[pattern]))


def test_a_prompt_with_holes_decodes_in_one_op_and_leaves_the_cache_in_order(monkeypatch):
    (model, _), ids, mask = pair("full"), tokens(B, T), PATTERNS["everything"]
    with counted(monkeypatch) as steps:
        out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert steps == [1] * 4  # the modules took the prompt
    again, positions = ElasticCache(), (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, cache=again)
    for mine, theirs in zip(out.cache.layers, again.layers, strict=True):
        torch.testing.assert_close(mine.keys[:, :T], theirs.keys[:, :T])


def test_left_padding_is_read_off_a_mask():
    found = {name for name, mask in PATTERNS.items() if is_left_padded(mask)}
    assert found == {"all", "left"}
    assert is_left_padded(rows("000", "111")) and not is_left_padded(rows("000", "110"))


def test_what_is_no_mask_is_said():
    (model, _), ids = pair("full"), tokens(B, T)
    for mask, error, text in (
        ([[1] * T] * B, TypeError, "attention_mask must be a tensor, got list"),
        (torch.ones(1, T), ValueError, r"attention_mask must have shape \[3, 9\] or \[3, 1, 9, 9\], got \[1, 9\]"),
        (torch.ones(B, T, T), ValueError, r"attention_mask must have shape .*, got \[3, 9, 9\]"),
        (torch.ones(B, 1, T, T).long(), TypeError, "attention_mask of four dimensions must be boolean or"),
        (torch.ones(B, 1, T, 5), ValueError, r"attention_mask must have shape .*, got \[3, 1, 9, 5\]"),
        (torch.ones(B, 3, T, T), ValueError, "attention_mask must have a mask for all or for each of 8 heads, got 3"),
    ):  # fmt: skip
        for kwargs in ({}, {"output_hidden_states": True}, {"cache": ElasticCache()}):
            with torch.no_grad(), pytest.raises(error, match=text):
                model(ids, attention_mask=mask, **kwargs)
