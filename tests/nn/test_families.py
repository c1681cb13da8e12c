"""Every family of the table: the full elastic model is the stock one, and each sub-network the plain model in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nn.models import EVERY, VARIANTS, row_model
from nn.test_elastic_model import relative
from nn.test_forward import counted
from nn.test_policy import routed, turned
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef

from flextron.config import Widths
from flextron.conversion import random_orders, reorder
from flextron.nn import FAMILIES, ElasticCache, elastic_config, make_elastic
from flextron.nn.forward import ElasticForward
from flextron.nn.packed import pack
from flextron.nn.plain import extract
from flextron.nn.proof import prove_sub_network, require_close

ROWS = (*EVERY, *VARIANTS)
# What the decoder op does not compute runs through the modules.
UNSERVED = ("gpt2", "opt", "mixtral", "qwen3_moe", "olmoe", "gpt_oss", "opt, norms last")
SERVED = tuple(row for row in ROWS if row not in UNSERVED)
each_row = pytest.mark.parametrize("row", ROWS)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def ragged(config) -> Widths:
    """Widths that differ between layers, none of them full in all."""
    mlp, heads = config.mlp_choices, config.head_choices
    return Widths(
        tuple(mlp[i % (len(mlp) - 1)] for i in range(config.num_layers)),
        tuple(heads[(i + 1) % len(heads)] for i in range(config.num_layers)),
    )


def test_every_family_is_tried():
    assert {*EVERY} == {*FAMILIES}


@each_row
def test_the_full_model_is_the_stock_one(row):
    """Logits of every mask, gradients, and counted parameters."""
    stock = row_model(row)
    elastic = make_elastic(copy.deepcopy(stock))
    ids = tokens(2, 12)
    padded = torch.ones_like(ids)
    padded[1, :5] = 0
    holed = padded.clone()
    holed[0, 7] = 0
    for mask in (None, padded, holed):
        theirs, ours = (m(ids, attention_mask=mask, use_cache=False).logits for m in (stock, elastic))
        seen = slice(None) if mask is None else mask.bool()
        require_close("test", "stock", theirs[seen], ours[seen])
    for m in (stock, elastic):
        m(ids, use_cache=False, labels=ids).loss.backward()
    for (name, a), b in zip(stock.named_parameters(), elastic.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 2e-4 * max(1e-3, float(a.grad.abs().max())), name
    config = elastic.elastic
    for widths in (config.full(), config.smallest(), ragged(config)):
        plain = extract(elastic, widths)
        assert sum(p.numel() for p in plain.parameters()) == config.params(widths)


# conversion proves the other unit of every family
@pytest.mark.parametrize(
    ("row", "unit"), [*((row, "query") for row in ROWS), *((row, "kv_group") for row in VARIANTS)]
)
def test_a_sub_network_is_its_plain_model(row, unit):
    stock = row_model(row)
    elastic = make_elastic(copy.deepcopy(stock), elastic_config(stock, unit))
    config = elastic.elastic
    for widths in (config.smallest(), ragged(config)):
        prove_sub_network("test", elastic, widths, tokens(1, 24))


@each_row
def test_sorting_changes_nothing(row):
    stock = row_model(row)
    moved = copy.deepcopy(stock)
    config = elastic_config(moved)
    reorder(moved, random_orders(config, 1), config)
    assert any(not torch.equal(a, b) for a, b in zip(stock.parameters(), moved.parameters(), strict=True))
    ids = tokens(1, 12)
    require_close("test", "stock", *(m(ids, use_cache=False).logits for m in (stock, moved)))


@each_row
def test_a_mixed_batch_keeps_to_the_width_of_each_request(row):
    """Prompt and cached tokens, padded on the left."""
    elastic = make_elastic(row_model(row))
    config = elastic.elastic
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    both = [config.smallest(), ragged(config)]
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    alone = [
        elastic.generate(
            ids[i : i + 1, skip:], attention_mask=mask[i : i + 1, skip:], budget=widths, **options
        )
        for i, (widths, skip) in enumerate(zip(both, (0, 3), strict=True))
    ]
    with elastic.budget(widths=both):
        mixed = elastic.generate(ids, attention_mask=mask, **options)
    for i, row_alone in enumerate(alone):
        assert torch.equal(mixed[i, -4:], row_alone[0, -4:])


@pytest.mark.parametrize(
    "row", [row for row in EVERY if row not in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")]
)
@torch.no_grad()
def test_packed_weights_give_the_same_logits(row):
    elastic = make_elastic(row_model(row), elastic_config(row_model(row), "query"))
    ids, widths = tokens(1, 12), [elastic.elastic.full(), ragged(elastic.elastic)]
    plain = []
    for each in widths:
        with elastic.budget(widths=each):
            plain.append(elastic(ids, use_cache=False).logits)
    pack(elastic)
    for each, before in zip(widths, plain, strict=True):
        with elastic.budget(widths=each):
            require_close("test", "the plain model", before, elastic(ids, use_cache=False).logits)


def test_experts_are_not_packed():
    with pytest.raises(NotImplementedError, match="MLPs must have no experts, got those of a mixtral"):
        pack(make_elastic(row_model("mixtral")))


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ("phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("opt", ["q_proj", "fc1", "fc2"]),
        ("gpt_neox", ["query_key_value", "dense_h_to_4h"]),
    ],
)
def test_adapters_of_fused_and_owned_projections(row, names):
    stock = row_model(row)
    models = []
    for model in (stock, make_elastic(copy.deepcopy(stock))):
        torch.manual_seed(1)
        models.append(get_peft_model(model, LoraConfig(r=4, target_modules=names, init_lora_weights=False)))
    ids = tokens(2, 9)
    require_close("test", "stock", *(model(ids, use_cache=False).logits.detach() for model in models))


def test_adapters_of_transposed_weights_are_refused():
    model = get_peft_model(
        make_elastic(row_model("gpt2")), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    with pytest.raises(NotImplementedError, match=r"Linear of transformers\.pytorch_utils\.Conv1D"):
        model(tokens(1, 4))


@each_row
def test_the_decoder_op_serves_what_it_computes(row):
    forward = ElasticForward(make_elastic(row_model(row)))
    assert (forward.serves, forward.fault is None) == (row in SERVED, row in SERVED)


@pytest.mark.parametrize("row", SERVED)
def test_the_decoder_op_gives_what_the_modules_give(row, monkeypatch):
    """A prompt padded on the left, a token, and a few more; in bfloat16 it is no less exact than the modules."""
    model, ids, cuts = make_elastic(row_model(row)), tokens(2, 14), [9, 1, 4]
    model.set_widths(ragged(model.elastic))
    packed = copy.deepcopy(model)
    pack(packed)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0

    def by(on: bool, model: Any = model) -> torch.Tensor:
        cache, found = ElasticCache(), []
        with counted(monkeypatch, on) as steps, torch.no_grad():
            for start, part in zip((0, 9, 10), ids.split(cuts, 1), strict=True):
                seen = mask[:, : start + part.shape[1]]
                positions = (seen.cumsum(1) - 1).clamp(min=0)[:, start:]
                found.append(model(part, attention_mask=seen, position_ids=positions, cache=cache).logits)
        assert steps == (cuts if on else [])
        return torch.cat(found, 1)[mask.bool()]

    for each in (model, packed):
        assert relative(by(True, each), by(False, each)) < 1e-5
    model.to(torch.bfloat16)
    ours, theirs = by(True).double(), by(False).double()
    exact = model.double() and by(False)
    assert relative(ours, exact) <= 1.5 * relative(theirs, exact)


@pytest.mark.parametrize("how", ["each", "adaptive"])
@pytest.mark.parametrize("unit", ["kv_group", "query"])
@pytest.mark.parametrize("row", ["olmo2", "cohere", "gpt_neox"])
@torch.no_grad()
def test_the_decoder_op_norms_and_reads_fused_heads_of_each_tokens_own(row, unit, how, monkeypatch):
    """Norms over all heads and of each, and fused projections, at budgets of requests and choices of tokens."""
    stock, ids = row_model(row), tokens(3, 12)
    model = routed(make_elastic(stock, elastic_config(stock, unit)))
    if how == "adaptive":
        turned(model, 0.4, 0.6, 0.8)
    else:
        model.set_widths([model.elastic.smallest(), ragged(model.elastic), model.elastic.full()], "all")
    found = []
    for on in (True, False):
        cache = ElasticCache()
        with counted(monkeypatch, on) as steps:
            found.append(torch.cat([model(part, cache=cache).logits for part in ids.split([9, 1, 2], 1)], 1))
        assert len(steps) == (3 if on else 0)
    assert relative(*found) < 1e-5


@torch.no_grad()
def test_what_the_decoder_op_held_of_fused_weights_goes_when_they_are_converted():
    model = make_elastic(row_model("phi3"))
    model(tokens(1, 5), use_cache=False)
    before = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    model.to(torch.bfloat16)
    assert all(storage.expired() for storage in before)


@torch.no_grad()
def test_in_training_embeddings_are_dropped_without_gradients_too():
    model = make_elastic(row_model("phi", embd_pdrop=0.5)).train()
    once, again = (model(tokens(1, 5), use_cache=False).logits for _ in range(2))
    assert not torch.equal(once, again)


@pytest.mark.parametrize("row", ["olmo", "olmo2", "cohere"])
def test_tables_of_rotations_may_be_wider_than_the_weights(row):
    model = make_elastic(row_model(row)).to(torch.bfloat16)
    with torch.no_grad():
        assert model(tokens(1, 5), use_cache=False).logits.isfinite().all()
