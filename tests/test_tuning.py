"""Joint tuning: model and router move together, a killed run resumes bit for bit, every option changes something."""

import json
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from training.tiny_run import elastic, parent, tokens

from flextron.nn.policy import Relaxed
from flextron.nn.router import AdaptiveRouter, Probabilities, StaticRouter
from flextron.recipes import TrainConfig, TuneConfig
from flextron.tuning import tune

CONFIG = TuneConfig(
    steps=6,
    batch_size=4,
    length=12,
    learning_rate=1e-3,
    bf16=False,
    eval_every=0,
    checkpoint_every=2,
    warmup=0.0,
)
TARGETS = (0.6, 0.8, 1.0)


def router_of(model, kind: str = "adaptive"):
    c = model.elastic
    if kind == "static":
        return StaticRouter(c.num_layers, c.choices, TARGETS, hidden=8)
    return AdaptiveRouter(c.num_layers, c.hidden_size, c.choices, TARGETS, 8)


def fraction(p: Probabilities) -> Tensor:
    """A table: a fifth of the full latency, and each choice's rank."""
    parts = [(axis * torch.linspace(0, 1, axis.shape[-1])).sum(-1).mean(-1) for axis in p]
    return 0.2 + 0.8 * (parts[0] + parts[1]) / 2


def run(directory, kind: str = "adaptive", config: TuneConfig = CONFIG, teacher: bool = False, **options):
    model = elastic()
    router = router_of(model, kind)
    report = tune(
        model,
        router,
        fraction,
        tokens(),
        config,
        directory,
        teacher=parent(1) if teacher else None,
        **options,
    )
    return model, router, report


def same(a, b) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("gates", ["soft", "hard"])
@pytest.mark.parametrize("kind", ["adaptive", "static"])
def test_model_and_router_both_move_and_are_left_as_they_were_set(kind, gates, tmp_path):
    model, router, report = run(tmp_path, kind, replace(CONFIG, gates=gates, full_probability=0.0))
    assert not same(model, elastic()) and not same(router, router_of(model, kind))
    assert len(report.losses) == 6 and not any(p.requires_grad for p in router.parameters())
    assert model.dial.widths == (model.elastic.full(),)
    assert model.settings.now().policy is None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0.2 < line["size"] < 1 and line["latency_miss"] >= 0 for line in lines)


def test_a_killed_run_ends_with_the_weights_it_would_have_had(tmp_path):
    whole = run(tmp_path / "whole", teacher=True, config=replace(CONFIG, distillation=1.0))

    class Killed(Exception):
        pass

    def kill(step, steps, record):
        if step == 3:
            raise Killed

    config = replace(CONFIG, distillation=1.0)
    with pytest.raises(Killed):
        run(tmp_path / "cut", teacher=True, config=config, progress=kill)
    resumed = run(tmp_path / "cut", teacher=True, config=config)
    assert resumed[2].resumed_from == 2
    assert same(whole[0], resumed[0]) and same(whole[1], resumed[1])
    assert whole[2].losses == resumed[2].losses


def test_a_run_of_another_router_or_config_is_not_taken_up(tmp_path):
    run(tmp_path)
    for kind, config, words in (
        ("static", CONFIG, "router"),
        ("adaptive", replace(CONFIG, gates="soft"), "got --gates soft instead of hard"),
    ):
        with pytest.raises(ValueError, match=words):
            run(tmp_path, kind, config)
    assert run(tmp_path, "static", resume=False)[2].resumed_from == 0


def test_the_latency_term_pulls_the_mean_to_the_target(tmp_path):
    config = replace(
        CONFIG, steps=150, learning_rate=1e-4, router_rate=200.0, full_probability=0.0, latency_weight=50.0,
        checkpoint_every=0,
    )  # fmt: skip
    run(tmp_path, "adaptive", config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(line["latency_miss"] for line in part) / 10 for part in (lines[:10], lines[-10:]))
    assert last < 0.3 * first


@pytest.mark.parametrize(
    "name", sorted({f.name for f in fields(TuneConfig)} - {f.name for f in fields(TrainConfig)})
)
def test_every_option_of_tuning_changes_the_router(name, tmp_path):
    other = {"router_rate": 60.0, "gates": "soft", "latency_weight": 1.0}[name]
    config = replace(CONFIG, steps=2, full_probability=0.0)
    plain = run(tmp_path / "a", config=config)[1]
    assert not same(plain, run(tmp_path / "b", config=replace(config, **{name: other}))[1])


def test_full_micro_batches_ask_no_router(tmp_path, monkeypatch):
    asked = []
    real = Relaxed.__call__
    monkeypatch.setattr(Relaxed, "__call__", lambda self, x, layer: asked.append(1) or real(self, x, layer))
    model, router, _ = run(tmp_path, config=replace(CONFIG, full_probability=1.0))
    assert not asked and same(router, router_of(model)) and not same(model, elastic())


def test_static_sequences_share_one_draw(monkeypatch, tmp_path):
    kept = []
    real = Relaxed.__call__

    def watched(self, x, layer):
        decision = real(self, x, layer)
        kept.append(decision.mlp.choice.view(x.shape[:2]))
        return decision

    monkeypatch.setattr(Relaxed, "__call__", watched)
    run(tmp_path, "static", replace(CONFIG, full_probability=0.0))
    assert all((choice == choice[:, :1]).all() for choice in kept)
    assert any(len(choice[:, 0].unique()) > 1 for choice in kept)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="gates must be one of soft, hard, got 'none'"):
        TuneConfig(gates="none")
    with pytest.raises(ValueError, match="router_rate must be at least 0, got -1"):
        TuneConfig(router_rate=-1)
