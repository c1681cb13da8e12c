"""A fit is the least squares that it says it is, over the hidden features that layers of the full network have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn.models import small_model
from torch import Tensor

from flextron.config import Widths
from flextron.conversion import refit as module
from flextron.conversion.refit import RIDGE, refit, refitted
from flextron.nn import elastic_config, make_elastic
from flextron.nn.plain import build

TEXT = torch.randint(0, 61, (160, 16), generator=torch.Generator().manual_seed(3))


def elastic(family: str = "llama", unit: str = "kv_group") -> Any:
    model = small_model(family)
    return make_elastic(model, elastic_config(model, unit)).requires_grad_(False)


def inputs_of(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """[tokens, inputs] float64 that the full network gives each last projection, by the name of its weight."""
    stock = build(model, model.elastic.full(), "uniform").double()
    seen: dict[str, Tensor] = {}
    for name in module._fitted(model):
        path = name.removesuffix(".weight")

        def see(_: Any, args: Any, name: str = name) -> None:
            seen[name] = args[0].flatten(0, -2)

        stock.get_submodule(path).register_forward_pre_hook(see)
    with torch.no_grad():
        stock(tokens)
    return seen


def straight(model: Any, name: str, weight: Tensor) -> Tensor:
    """[outputs, inputs] float64"""
    return (weight.T if model.anatomy.transposed else weight).double()


def masks_of(model: Any, name: str, only: Widths | None) -> list[tuple[Tensor, float]]:
    """The inputs that each width keeps, and how much it counts: written down without the anatomy."""
    c, found = model.elastic, []
    whole = model.anatomy.whole(model.config)
    is_heads = f"{model.anatomy.attention}.{model.anatomy.output}." in name
    menu = c.head_choices if is_heads else c.mlp_choices
    layer = int(next(part for part in name.split(".") if part.isdigit()))
    if only is not None:
        menu = ((only.heads if is_heads else only.mlp)[layer],)
    for width in menu:
        if is_heads:
            grid = torch.zeros(whole.groups, whole.per_group, c.head_dim)
            grid[(slice(width),) if c.unit == "kv_group" else (slice(None), slice(width))] = 1
            mask = grid.flatten()
        else:
            mask = (torch.arange(whole.neurons) < width).float()
        found.append((mask.double(), 1.0 if only is not None or width == menu[-1] else 0.3))
    return found


def expected(model: Any, name: str, weight: Tensor, hidden: Tensor, only: Widths | None) -> Tensor:
    """The same minimum by torch's least squares: one row of equations for each width, token and ridge."""
    parent, rows, wanted = straight(model, name, weight), [], []
    masks = masks_of(model, name, only)
    for mask, share in masks:
        rows.append(share**0.5 * hidden * mask)
        wanted.append(share**0.5 * hidden @ parent.T)
    ridge = (RIDGE * hidden.square().sum(0).mean() * sum(share for _, share in masks)) ** 0.5
    rows.append(ridge * torch.eye(hidden.shape[1], dtype=torch.float64))
    wanted.append(ridge * parent.T)
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted), driver="gelsd").solution.T


@pytest.mark.parametrize(
    ("family", "unit", "one"),
    [
        *(
            (family, "kv_group", False)
            for family in ("llama", "gemma2", "gpt2", "gpt_neox", "falcon", "qwen3_moe")
        ),
        ("llama", "query", False),
        ("llama", "kv_group", True),
        ("gpt2", "kv_group", True),
        ("llama", "query", True),
    ],
)
def test_every_projection_is_the_least_squares(family, unit, one):
    model = elastic(family, unit)
    before = {name: p.clone() for name, p in model.named_parameters()}
    c = model.elastic
    middle = Widths(
        c.mlp_choices[:1] + c.mlp_choices[1:2] * (c.num_layers - 1), c.head_choices[-2:][:1] * c.num_layers
    )
    only = middle if one else None
    hidden = inputs_of(model, TEXT[20:])
    report = refit(model, TEXT, only=only)
    assert report.tokens == 140 * 16
    after = dict(model.named_parameters())
    fitted = module._fitted(model)
    assert len(fitted) == c.num_layers * (1 if family == "qwen3_moe" else 2)
    moved = 0
    for name, old in before.items():
        if name not in fitted or name in report.kept:
            assert torch.equal(old, after[name]), name
            continue
        want = expected(model, name, old, hidden[name], only)
        got = straight(model, name, after[name])
        # hidden features are float32 in the fit, and the systems' condition is some 1e3
        torch.testing.assert_close(got, want, rtol=0, atol=1e-3 * float(want.abs().max()))
        moved += 1
    assert moved


def test_what_fits_in_one_pass_is_what_many_find(monkeypatch):
    whole, parts = elastic(), elastic()
    first = refit(whole, TEXT)
    monkeypatch.setattr(module, "_ROOM", 1)
    calls: list[tuple[int, int]] = []
    second = refit(parts, TEXT, batch_size=32, progress=lambda *done: calls.append(done))
    assert calls[-1] == (160 * 3, 160 * 3) and calls == sorted(calls)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert first.tokens == second.tokens


def test_errors_are_those_of_held_out_tokens():
    model = elastic()
    parents = {name: p.double().clone() for name, p in module._fitted(model).items()}
    hidden = inputs_of(model, TEXT[:20])
    report = refit(model, TEXT)
    for axis, key in (("mlp", "down_proj"), ("heads", "o_proj")):
        for i, row in enumerate(report.errors[axis]):
            for when, weights in (("before", parents), ("after", module._fitted(model))):
                shares = []
                for name, parent in parents.items():
                    if key in name:
                        mask, _ = masks_of(model, name, None)[i]
                        missed = hidden[name] @ (parent - weights[name].double() * mask).T
                        shares.append(missed.square().sum() / (hidden[name] @ parent.T).square().sum())
                assert row[when] == pytest.approx(float(sum(shares) / len(shares)), rel=1e-3, abs=1e-6)
        assert report.errors[axis][-1]["before"] == pytest.approx(0, abs=1e-9)


def test_what_only_fits_its_own_text_is_left_as_it_was(monkeypatch):
    model = elastic()
    before = {name: p.clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(module, "_solved", lambda job, *_: job.weight.double() + 10)
    report = refit(model, TEXT)
    assert sorted(report.kept) == sorted(module._fitted(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for rows in report.errors.values():
        assert all(row["before"] == row["after"] for row in rows)


def test_a_network_of_its_own_is_fitted_within_a_block_alone():
    model = elastic()
    before = {name: p.clone() for name, p in model.named_parameters()}
    narrow = model.elastic.smallest()
    with pytest.raises(KeyError), refitted(model, narrow, TEXT) as report:
        assert not report.kept and any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TEXT[:1], {}, "at least 2 sequences"),
        (TEXT.float(), {}, "token ids"),
        (TEXT, {"narrower": 0}, "narrower must lie in"),
        (TEXT, {"ridge": 2}, "ridge must lie in"),
        (TEXT, {"only": Widths((1,), (1,))}, "one entry for each of 3 layers"),
    ],
)
def test_bad_input_changes_nothing(text, options, message):
    model = elastic()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        refit(model, text, **options)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
