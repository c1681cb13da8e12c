"""A fit in order is the least squares that it says it is, over what each network itself computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn.models import small_model
from torch import Tensor

from flextron.config import Widths
from flextron.conversion.refit_in_order import refit_in_order
from flextron.nn import elastic_config, make_elastic
from flextron.nn.plain import build

TEXT = torch.randint(0, 61, (42, 16), generator=torch.Generator().manual_seed(3))
SHARE, RIDGE = 0.3, 1e-3


def elastic(family: str = "llama", unit: str = "kv_group", skips: bool = False) -> Any:
    model = small_model(family)
    config = elastic_config(model, unit)
    if skips:
        config = elastic_config(model, unit, (0, *config.mlp_choices), (0, *config.head_choices))
    return make_elastic(model, config).requires_grad_(False)


def seen_by(model: Any, widths: Widths) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """What one plain network computes, in float64: for each layer the features and the stream at both projections."""
    stock, anatomy = build(model, widths, "ragged").double(), model.anatomy
    found: list[dict[str, Tensor]] = []
    outs: list[Tensor] = []
    for layer in anatomy.layers_in(stock):
        own: dict[str, Tensor] = {}
        found.append(own)
        parts = {
            "heads": getattr(anatomy.attention_in(layer), anatomy.output),
            "mlp": getattr(anatomy.mlp_in(layer), anatomy.down),
        }
        norms = {"heads": layer, "mlp": getattr(layer, anatomy.mlp_norm)}
        for part in parts:

            def features(_: Any, args: Any, own=own, part=part) -> None:
                own[part] = args[0].flatten(0, -2)

            def stream(_: Any, args: Any, own=own, part=part) -> None:
                own[f"{part} stream"] = args[0].flatten(0, -2)

            parts[part].register_forward_pre_hook(features)
            norms[part].register_forward_pre_hook(stream)
        layer.register_forward_hook(
            lambda _, __, out: outs.append((out[0] if isinstance(out, tuple) else out).flatten(0, -2))
        )
    with torch.no_grad():
        stock(TEXT)
    return found, outs


def kept_by(model: Any, part: str, width: int) -> Tensor:
    """[inputs] bool: the inputs of a last projection that a width keeps, written down without the anatomy."""
    whole, c = model.anatomy.whole(model.config), model.elastic
    if part == "mlp":
        return torch.arange(whole.neurons) < width
    grid = torch.zeros(whole.groups, whole.per_group, c.head_dim, dtype=torch.bool)
    grid[(slice(width),) if c.unit == "kv_group" else (slice(None), slice(width))] = True
    return grid.flatten()


@pytest.mark.parametrize(
    ("family", "unit", "skips"),
    [
        ("llama", "kv_group", False),
        ("llama", "query", False),
        ("llama", "kv_group", True),
        ("gpt2", "kv_group", False),
        ("qwen3", "kv_group", False),
    ],
)
def test_every_projection_gives_what_the_streams_lack(family, unit, skips):
    model = elastic(family, unit, skips)
    c, anatomy = model.elastic, model.anatomy
    networks = [c.smallest(), c.uniform(1, -1)]
    nets = [(w, SHARE) for w in networks] + [(c.full(), 1.0)]
    weights_before = {name: p.clone() for name, p in model.named_parameters()}
    parent, outs = seen_by(model, c.full())
    done: list[tuple[int, int]] = []
    report = refit_in_order(
        model, TEXT, networks, narrower=SHARE, ridge=RIDGE, batch_size=8, progress=lambda *at: done.append(at)
    )
    assert report.tokens == TEXT.numel() and done == [(i + 1, c.num_layers) for i in range(c.num_layers)]
    now = [(widths, share, seen_by(model, widths)[0]) for widths, share in nets]
    after, moved = dict(model.named_parameters()), set()
    for i in range(c.num_layers):
        for part, path, wanted in (
            ("heads", anatomy.path(anatomy.attention, anatomy.output), parent[i]["mlp stream"]),
            ("mlp", anatomy.path(anatomy.mlp, anatomy.down), outs[i]),
        ):
            name = f"{anatomy.layer_path(i)}.{path}.weight"
            moved.add(name)
            old, new = (
                (w.T if anatomy.transposed else w).double() for w in (weights_before[name], after[name])
            )
            bias = after.get(name.replace("weight", "bias"), torch.zeros(()))
            rows, goals, pull = [], [], 0.0
            for widths, share, seen in now:
                mask = kept_by(model, part, getattr(widths, part)[i])
                if not mask.any():
                    continue
                H = torch.zeros(TEXT.numel(), len(mask), dtype=torch.float64)
                H[:, mask] = seen[i][part]
                rows.append(share**0.5 * H)
                goals.append(share**0.5 * (wanted - seen[i][f"{part} stream"] - bias))
                pull += RIDGE * share * float(H[:, mask].square().sum(0).mean())
            rows.append(pull**0.5 * torch.eye(old.shape[1], dtype=torch.float64))
            goals.append(pull**0.5 * old.T)
            best = torch.linalg.lstsq(torch.cat(rows), torch.cat(goals), driver="gelsd").solution.T
            # streams and features are float32 in the fit, and the systems' condition is some 1e3
            torch.testing.assert_close(new, best, rtol=0, atol=2e-3 * float(best.abs().max()), msg=name)
    changed = {n for n, p in weights_before.items() if not torch.equal(p, after[n])}
    assert changed == moved


def test_networks_lose_less_than_by_a_fit_of_each_projection_alone():
    from flextron.conversion.refit import refit

    losses = []
    for fit in (refit, refit_in_order):
        model = elastic()
        c = model.elastic
        network = Widths(c.mlp_choices[:1] * c.num_layers, c.head_choices[:1] * c.num_layers)
        with torch.no_grad():
            wanted = model(input_ids=TEXT).logits
            fit(model, TEXT, **({"networks": [network]} if fit is refit_in_order else {}))
            model.set_widths(network)
            losses.append(float((model(input_ids=TEXT).logits - wanted).square().mean()))
    assert losses[1] < 0.9 * losses[0], losses


@pytest.mark.parametrize(
    ("family", "text", "options", "message"),
    [
        ("gemma2", TEXT, {}, "got gemma2: what attention and MLP give is not added"),
        ("gpt_neox", TEXT, {}, "got gpt_neox: attention and MLP read"),
        ("llama", TEXT[:1], {}, "at least 2 sequences"),
        ("llama", TEXT, {"ridge": 0.0}, "ridge must lie in"),
        ("llama", TEXT, {"networks": []}, "networks must be at least one below the full one, got none"),
        ("llama", TEXT, {"networks": [Widths((1,), (1,))]}, "one entry for each of 3 layers"),
    ],
)
def test_bad_input_changes_nothing(family, text, options, message):
    model = elastic(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        refit_in_order(model, text, **({"networks": [model.elastic.smallest()]} | options))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
