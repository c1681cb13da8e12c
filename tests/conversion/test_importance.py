"""Scores are what a straightforward computation over all tokens gives, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn.models import FAMILIES, GQA, small_model
from torch import Tensor

from flextron.conversion import AGGREGATES, score


def calibration(n: int = 5, L: int = 9) -> Tensor:
    return torch.randint(0, 61, (n, L), generator=torch.Generator().manual_seed(3))


def plainly(model: Any, tokens: Tensor, aggregate: str) -> tuple[list[Tensor], list[Tensor]]:
    """Walk through the layers by hand, one sequence at a time, in float64, and keep every token's values."""
    model = model.double()
    c = model.config
    D, H, G = c.head_dim if hasattr(c, "head_dim") else c.hidden_size // c.num_attention_heads, *GQA_OF(c)
    neurons, heads = ([[] for _ in model.model.layers] for _ in range(2))
    for row in tokens:
        x = model.model.embed_tokens(row[None])
        place = torch.arange(len(row))[None]
        cos, sin = model.model.rotary_emb(x, place)
        for i, layer in enumerate(model.model.layers):
            h, a = layer.input_layernorm(x), layer.self_attn
            q, k, v = (p(h)[0].unflatten(-1, (-1, D)).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
            if c.model_type == "qwen3":
                q, k = a.q_norm(q), a.k_norm(k)
            turn = lambda t: t * cos + torch.cat((-t[..., D // 2 :], t[..., : D // 2]), -1) * sin  # noqa: B023, E731
            q, k = turn(q), turn(k)
            out = []
            for head in range(H):
                group = head // (H // G)
                logits = q[head] @ k[group].T * D**-0.5
                logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), float("-inf"))
                out.append(logits.softmax(-1) @ v[group])
            heads[i].append(torch.stack(out, 1).norm(dim=-1))
            x = x + a.o_proj(torch.cat(out, -1))[None]
            h = layer.post_attention_layernorm(x)
            hidden = torch.nn.functional.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h)
            neurons[i].append(hidden[0].abs())
            x = x + layer.mlp.down_proj(hidden)
    put = {
        "l2": lambda a: a.square().sum(0).sqrt(),
        "mean_abs": lambda a: a.mean(0),
        "variance": lambda a: a.var(0, correction=0),
    }[aggregate]
    return [put(torch.cat(a)) for a in neurons], [put(torch.cat(a)) for a in heads]


def GQA_OF(config: Any) -> tuple[int, int]:
    return config.num_attention_heads, config.num_key_value_heads


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_are_those_of_the_definition(family: str, aggregate: str) -> None:
    model = small_model(family, "3:1")
    found = score(model, calibration(), aggregate=aggregate, batch_size=2)
    neurons, heads = plainly(model, calibration(), aggregate)
    for ours, exact in [*zip(found.neurons, neurons, strict=True), *zip(found.heads, heads, strict=True)]:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=2e-4, atol=1e-6)
    assert found.tokens == 45 and found.aggregate == aggregate


@pytest.mark.parametrize("gqa", GQA)
def test_a_group_counts_its_heads_together(gqa: str) -> None:
    model = small_model("llama", gqa)
    found = score(model, calibration())
    H, G = GQA[gqa]
    for heads, groups in zip(found.heads, found.groups(G), strict=True):
        by_hand = [heads[g * (H // G) : (g + 1) * (H // G)].sum() for g in range(G)]
        assert len(heads) == H
        torch.testing.assert_close(groups, torch.stack(by_hand))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_batches_do_not_matter(aggregate: str) -> None:
    model = small_model()
    one, all_ = (score(model, calibration(), aggregate=aggregate, batch_size=b) for b in (1, 8))
    for a, b in zip(one.neurons + one.heads, all_.neurons + all_.heads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_aggregates_differ() -> None:
    """The option does something: all three order the neurons in ways of their own."""
    orders = {
        tuple(score(small_model(), calibration(), aggregate=a).neurons[0].argsort().tolist())
        for a in AGGREGATES
    }
    assert len(orders) == len(AGGREGATES)


def test_a_large_mean_does_not_hide_the_variance() -> None:
    """Float32 sums of squares would: the mean is 10 000 times the deviation."""
    from flextron.conversion.importance import _Moments

    values = 1000 + 0.1 * torch.randn(
        4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    moments = _Moments(3, torch.device("cpu"))
    for part in values.float().split(100):
        moments.add(part)
    torch.testing.assert_close(
        moments.aggregate("variance").double(), values.float().double().var(0), rtol=1e-2, atol=0
    )


def test_low_precision_parents_are_scored_in_float32() -> None:
    found = score(small_model().bfloat16(), calibration())
    assert all(t.dtype == torch.float32 for t in found.neurons + found.heads)


def test_scoring_leaves_no_trace() -> None:
    model = small_model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    score(model, calibration(), batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"must be token ids \[n, L\] int64, got \[4\]"),
        (torch.zeros(4, 4), "must be token ids"),
        ([[1, 2]], "must be token ids"),
        (torch.zeros(0, 4, dtype=torch.int64), "at least 1 sequences"),
        (torch.full((2, 3), 61), "ids below 61, got ids from 61 to 61"),
        (torch.full((2, 3), -1), "ids below 61, got ids from -1"),
    ],
)
def test_what_is_no_calibration_is_refused(tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(small_model(), tokens)


def test_an_unknown_aggregate_is_refused() -> None:
    with pytest.raises(ValueError, match="aggregate must be one of l2, mean_abs, variance, got 'max'"):
        score(small_model(), calibration(), aggregate="max")
