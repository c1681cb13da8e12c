"""Promises of the training loop: it learns, every option counts, at full width it is ordinary training."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny_run
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from flextron.checkpoint import load_tensors
from flextron.config import Widths
from flextron.data import Batches, windows
from flextron.recipes import TrainConfig
from flextron.training import learning_rate, train

BASE = TrainConfig(
    steps=3,
    batch_size=2,
    length=12,
    accumulation=2,
    learning_rate=1e-2,
    warmup=0.4,
    clip=0.1,
    distillation=0.5,
    bf16=False,
    eval_every=0,
    checkpoint_every=0,
)
PLAIN = replace(BASE, distillation=0.0, clip=None)
VALIDATION = windows(tiny_run.tokens(), 4, 12)

FLIPPED = {
    "steps": 4,
    "batch_size": 3,
    "length": 13,
    "accumulation": 1,
    "learning_rate": 2e-2,
    "warmup": 0.0,
    "min_lr_ratio": 0.5,
    "weight_decay": 0.5,
    "betas": (0.5, 0.95),
    "clip": None,
    "cross_entropy": 0.25,
    "distillation": 0.25,
    "teacher_logits": 5,
    "temperature": 2.0,
    "bf16": True,
    "checkpoint_activations": True,
    "eval_every": 1,
    "eval_widths": (Widths((8, 24), (2, 1)),),
    "checkpoint_every": 1,
    "full_probability": 1.0,
    "networks": (Widths((8, 8), (1, 1)),),
    "shard": "none",
    "widths_per_rank": True,
    "seed": 1,
}
# these change what is reported and saved; the weights must not notice
REPORTING = {"eval_every", "eval_widths", "checkpoint_every"}
# these change what a run costs, and nothing else
COSTS = {"checkpoint_activations", "shard"}


def outcome(config: TrainConfig, directory: Path) -> tuple[dict, tuple]:
    """The weights, and everything else a run leaves that is not time."""
    model = tiny_run.elastic()
    teacher = tiny_run.parent(1) if config.distillation else None
    report = train(model, tiny_run.tokens(), config, directory, teacher=teacher, validation=VALIDATION)
    files = sorted(p.name for p in directory.iterdir())
    return model.state_dict(), (report.losses, report.evaluations, files)


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", [f.name for f in fields(TrainConfig)])
def test_every_option_changes_something(name, tmp_path):
    base = replace(BASE, eval_every=2) if name == "eval_widths" else BASE
    flipped = replace(base, **{name: FLIPPED[name]})
    weights, rest = outcome(base, tmp_path / "base")
    other_weights, other_rest = outcome(flipped, tmp_path / "flipped")
    assert same(weights, other_weights) == (name in REPORTING | COSTS)
    assert (rest == other_rest) == (name in COSTS)


def test_same_configuration_same_outcome(tmp_path):
    weights, rest = outcome(BASE, tmp_path / "one")
    torch.manual_seed(1234)
    again, rest_again = outcome(BASE, tmp_path / "two")
    assert same(weights, again)
    assert rest == rest_again


@pytest.mark.parametrize("unit", ["kv_group", "query"])
def test_training_lowers_the_loss_of_every_width(unit, tmp_path):
    model = tiny_run.elastic(unit)
    config = replace(PLAIN, steps=30, batch_size=4, eval_every=30)
    report = train(model, tiny_run.tokens(), config, tmp_path, validation=VALIDATION)
    first, last = report.evaluations
    assert (first["step"], last["step"]) == (0, 30)
    assert [s["mlp"] for s in first["sub_networks"]] == [[8, 8], [16, 16], [24, 24]]
    for before, after in zip(first["sub_networks"], last["sub_networks"], strict=True):
        # a random model knows nothing: log(41) nats; one that knows the rule is left with a coin of 0.9
        assert before["loss"] == pytest.approx(math.log(tiny_run.VOCAB), abs=0.1)
        assert after["loss"] < before["loss"] - 0.5
    assert sum(report.losses[-5:]) < sum(report.losses[:5]) - 2


def stock_training(config: TrainConfig) -> tuple[torch.nn.Module, list[float], list[dict]]:
    """The same configuration at full width by the plain program: transformers' model, torch's loss and AdamW.

    The losses returned are transformers' own, which it computes in float32 for a float64 model too.
    """
    model = tiny_run.parent().double().train()
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.betas)
    batches = Batches(tiny_run.tokens(), config.batch_size, config.length, config.seed)
    losses, gradients = [], []
    for step in range(1, config.steps + 1):
        total = 0.0
        for _ in range(config.accumulation):
            batch = next(batches)
            output = model(input_ids=batch, labels=batch)
            loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            (loss / config.accumulation).backward()
            total += output.loss.item() / config.accumulation
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return model, losses, gradients


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("unit", ["kv_group", "query"])
def test_full_width_is_ordinary_training(unit, clip, tmp_path):
    config = replace(PLAIN, full_probability=1.0, clip=clip)
    model = tiny_run.elastic(unit).double()
    gradients = []
    hook = register_optimizer_step_pre_hook(
        lambda *_: gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    try:
        report = train(model, tiny_run.tokens(), config, tmp_path)
    finally:
        hook.remove()
    stock, losses, wanted = stock_training(config)
    assert report.losses == pytest.approx(losses, rel=1e-6)
    for ours, theirs in zip(gradients, wanted, strict=True):
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-7, atol=1e-10)
    for name, p in stock.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-7, atol=1e-8)


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    whole = replace(PLAIN, full_probability=1.0, batch_size=8, accumulation=1)
    outcomes = []
    for config in (
        whole,
        replace(whole, batch_size=4, accumulation=2),
        replace(whole, batch_size=1, accumulation=8),
    ):
        model = tiny_run.elastic().double()
        report = train(model, tiny_run.tokens(), config, tmp_path / str(config.batch_size))
        assert report.tokens == 3 * 8 * 12
        outcomes.append(model.state_dict())
    for name, value in outcomes[0].items():
        # AdamW divides by the gradient's own size: rounding of 1e-16 grows where it is nearly zero
        torch.testing.assert_close(outcomes[1][name], value, rtol=0, atol=1e-8)
        torch.testing.assert_close(outcomes[2][name], value, rtol=0, atol=1e-8)


def test_learning_rate_warms_up_and_falls_by_a_cosine():
    config = TrainConfig(steps=20, warmup=0.2, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(config, step) for step in range(1, 21)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[11] == pytest.approx(0.55)
    assert rates[7] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    always_warm = TrainConfig(steps=4, warmup=1.0, learning_rate=1.0)
    assert [learning_rate(always_warm, s) for s in range(1, 5)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert learning_rate(TrainConfig(steps=1, warmup=0.0, learning_rate=1.0), 1) == pytest.approx(0.1)


def test_rate_and_clipped_gradient_reach_the_optimiser(tmp_path):
    seen = []

    def look(optimizer, *_):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm(grads) / optimizer.grad_scale
        seen.append((optimizer.param_groups[0]["lr"], float(norm)))

    hook = register_optimizer_step_pre_hook(look)
    try:
        train(tiny_run.elastic(), tiny_run.tokens(), replace(PLAIN, clip=0.1), tmp_path)
    finally:
        hook.remove()
    assert [rate for rate, _ in seen] == [learning_rate(PLAIN, step) for step in (1, 2, 3)]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(record["gradient_norm"] > 0.1 for record in logged)
    assert [norm for _, norm in seen] == pytest.approx([0.1] * 3, rel=1e-4)


def test_norms_do_not_decay_and_matrices_do(tmp_path):
    changes = []
    for decay in (0.0, 0.5):
        model = tiny_run.elastic()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        config = replace(PLAIN, steps=1, warmup=0.0, weight_decay=decay)
        train(model, tiny_run.tokens(), config, tmp_path / str(decay))
        changes.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, p in before.items():
        shrunk = -learning_rate(config, 1) * 0.5 * p if p.dim() > 1 else torch.zeros_like(p)
        torch.testing.assert_close(changes[1][name] - changes[0][name], shrunk, rtol=1e-3, atol=1e-7)


def used(model, widths: Widths, layer: int) -> dict[str, torch.Tensor]:
    """Which entries of the layer's weights a sub-network uses, from the definition of its choice."""
    c = model.elastic
    M, D, n, d = c.heads_per_group, c.head_dim, widths.heads[layer], widths.mlp[layer]
    kept = torch.zeros(c.num_kv_heads, M, D, dtype=torch.bool)
    if c.unit == "kv_group":
        kept[:n] = True
    else:
        kept[:, :n] = True
    query, neurons = kept.flatten(), torch.arange(c.intermediate_size) < d
    stored = kept.any(1).flatten()
    return {
        "q_proj": query[:, None],
        "k_proj": stored[:, None],
        "v_proj": stored[:, None],
        "o_proj": query[None],
        "gate_proj": neurons[:, None],
        "up_proj": neurons[:, None],
        "down_proj": neurons[None],
    }


@pytest.mark.parametrize("unit", ["kv_group", "query"])
def test_what_a_width_leaves_out_gets_no_gradient(unit):
    model = tiny_run.elastic(unit).train()
    widths = Widths((8, 16), (1, 2))
    model.set_widths(widths)
    batch = VALIDATION
    model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    for index, layer in enumerate(model.layers_of()):
        for name, mask in used(model, widths, index).items():
            module = layer.mlp if hasattr(layer.mlp, name) else layer.attention
            gradient = getattr(module, name).weight.grad
            assert not gradient.masked_select(~mask).any(), name
            assert (gradient.masked_select(mask) != 0).float().mean() > 0.99, name


def test_every_micro_batch_draws_its_own_widths(tmp_path, monkeypatch):
    model = tiny_run.elastic()
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.widths))
    train(model, tiny_run.tokens(), replace(PLAIN, steps=10, accumulation=3, full_probability=0.0), tmp_path)
    assert len(seen) == 30
    assert len(set(seen)) > 10
    assert any(len({*seen[i : i + 3]}) == 3 for i in range(0, 30, 3))


def test_teacher_is_frozen_and_followed(tmp_path):
    """With distillation alone the student comes nearer to the teacher."""
    model, teacher = tiny_run.elastic(), tiny_run.parent(1).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    config = replace(PLAIN, steps=30, cross_entropy=0.0, distillation=1.0, full_probability=1.0)
    report = train(model, tiny_run.tokens(), config, tmp_path, teacher=teacher)
    assert report.distilled
    assert sum(report.losses[-5:]) < 0.7 * sum(report.losses[:5])
    assert same(before, teacher.state_dict())
    assert not teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_model_and_generator_are_left_as_they_were(tmp_path):
    model = tiny_run.elastic().eval()
    before = Widths((16, 8), (1, 2))
    model.set_widths(before, kv="all")
    torch.manual_seed(77)
    state = torch.get_rng_state()
    train(model, tiny_run.tokens(), PLAIN, tmp_path)
    assert (model.widths, model.kv, model.training) == (before, "all", False)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("where", ["loss", "gradient_norm"])
def test_nan_stops_before_the_weights_are_damaged(where, tmp_path):
    model = tiny_run.elastic()
    calls = 0

    def break_fifth(module, _, output):
        nonlocal calls
        calls += 1
        if calls == 5 and where == "loss":
            output.logits = output.logits * float("nan")
        elif calls == 5:
            output.logits.register_hook(lambda gradient: gradient * float("inf"))
        return output

    model.register_forward_hook(break_fifth)
    config = replace(PLAIN, steps=6, checkpoint_every=2)
    with pytest.raises(
        FloatingPointError, match=f"{where} must be finite, got (nan|inf) at step 3; the weights"
    ):
        train(model, tiny_run.tokens(), config, tmp_path)
    saved = load_tensors(tmp_path / "step-00000002" / "shard-00001-model-00001-of-00001.safetensors")
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in model.named_parameters())
    assert model.widths == model.elastic.full()
    assert all(p.grad is None for p in model.parameters())
    assert train(model, tiny_run.tokens(), config, tmp_path).resumed_from == 2


class Reads(TorchDispatchMode):
    """What the host reads of float32 tensors (the sampler draws in float64), between the optimiser's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.events += ["item"] * (args[0].dtype == torch.float32)
        elif func is torch.ops.aten._fused_adamw_.default and self.events[-1:] != ["step"]:
            self.events.append("step")  # both groups of parameters
        return func(*args, **(kwargs or {}))


def test_the_host_reads_the_device_once_a_step_and_after_it(tmp_path, monkeypatch):
    reads, tolist = Reads(), torch.Tensor.tolist

    def counted(self):
        reads.events += ["list"] * (self.dtype == torch.float32)
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    model, teacher = tiny_run.elastic(), tiny_run.parent(1)
    with reads:
        train(model, tiny_run.tokens(), replace(BASE, steps=4), tmp_path, teacher=teacher)
    assert reads.events == ["step", "list"] * 4


def test_gradients_left_by_the_caller_do_not_count(tmp_path):
    clean, used_before = tiny_run.elastic(), tiny_run.elastic()
    used_before(input_ids=VALIDATION, labels=VALIDATION, use_cache=False).loss.backward()
    for model, name in ((clean, "clean"), (used_before, "used")):
        train(model, tiny_run.tokens(), PLAIN, tmp_path / name)
    assert same(clean.state_dict(), used_before.state_dict())


def test_frozen_parameters_stay(tmp_path):
    model = tiny_run.elastic()
    model.model.embed_tokens.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, tiny_run.tokens(), replace(PLAIN, checkpoint_every=3), tmp_path)
    after = model.state_dict()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_progress_and_log_say_what_happened(tmp_path):
    calls = []
    model = tiny_run.elastic()
    report = train(
        model,
        tiny_run.tokens(),
        replace(BASE, eval_every=2),
        tmp_path,
        teacher=tiny_run.parent(1),
        validation=VALIDATION,
        progress=lambda *call: calls.append(call),
    )
    assert [(step, steps) for step, steps, _ in calls] == [(1, 3), (2, 3), (3, 3)]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r for r in records if "loss" in r] == [record for _, _, record in calls]
    assert [r["step"] for r in records] == [0, 1, 2, 2, 3, 3]
    last = calls[-1][2]
    assert last["loss"] == pytest.approx(last["cross_entropy"] + 0.5 * last["distillation"], rel=1e-5)
    assert last["tokens"] == report.tokens == 3 * 2 * 2 * 12
    assert 0 < last["size"] <= 1
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"]["distillation"] == 0.5
    assert run["config"]["bf16"] is False
    assert run["teacher"]["class"] == "LlamaForCausalLM"


def test_autocast_takes_place_when_asked_and_by_default_where_fast(tmp_path, monkeypatch):
    types = []
    model = tiny_run.elastic()
    mlp = model.layers_of()[0].mlp
    mlp.register_forward_hook(lambda module, _, output: types.append(output.dtype))
    for fast, asked, expected in (
        (True, None, torch.bfloat16),
        (False, None, torch.float32),
        (True, False, torch.float32),
        (False, True, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        types.clear()
        report = train(model, tiny_run.tokens(), replace(PLAIN, bf16=asked), tmp_path, resume=False)
        assert set(types) == {expected}
        assert report.bf16 == (expected == torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"warmup": 1.5}, r"warmup must lie in \[0, 1\], got 1.5"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two in \[0, 1\), got \(0.9, 1.0\)"),
        ({"clip": 0.0}, "clip must be above 0, or None, got 0.0"),
        ({"cross_entropy": -1.0}, "cross_entropy must be at least 0, got -1.0"),
        ({"teacher_logits": 5}, "teacher_logits must be 0 without distillation, got 5"),
        ({"cross_entropy": 0.0}, "one of cross_entropy and distillation must be above 0"),
        ({"full_probability": float("nan")}, "full_probability must be a number, got nan"),
    ],
)
def test_impossible_configuration_is_refused(change, says):
    with pytest.raises(ValueError, match=f"TrainConfig: {says}"):
        TrainConfig(**change)


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    model, tokens = tiny_run.elastic(), tiny_run.tokens()
    refused = [
        ((tiny_run.parent(), tokens, PLAIN), {}, "model must be elastic"),
        (
            (tiny_run.elastic().bfloat16(), tokens, PLAIN),
            {},
            "model must have float32 weights, got torch.bfloat16",
        ),
        ((tiny_run.elastic().requires_grad_(False), tokens, PLAIN), {}, "model must have a parameter"),
        ((model, tokens, BASE), {}, "teacher must be given exactly when .* got none and 0.5"),
        ((model, tokens, PLAIN), {"teacher": tiny_run.parent()}, "got LlamaForCausalLM and 0.0"),
        ((model, tokens, BASE), {"teacher": model}, "teacher must be another module"),
        ((model, tokens[:11], PLAIN), {}, "tokens must hold at least 12 tokens, got 11"),
        ((model, tokens, replace(PLAIN, eval_widths=(Widths((9, 9), (1, 1)),))), {}, "must be one of"),
    ]
    for arguments, options, says in refused:
        with pytest.raises(ValueError, match=says):
            train(*arguments, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_one_optimiser_step_is_taken_per_accumulation(tmp_path):
    steps = []
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    try:
        train(tiny_run.elastic(), tiny_run.tokens(), replace(PLAIN, accumulation=4), tmp_path)
    finally:
        hook.remove()
    assert len(steps) == 3


def test_dropout_is_on_in_training_alone(tmp_path):
    model = tiny_run.elastic().eval()
    modes = []
    model.model.embed_tokens.register_forward_hook(
        lambda m, _, x: modes.append(m.training) or F.dropout(x, 0.0)
    )
    train(
        model,
        tiny_run.tokens(),
        replace(PLAIN, accumulation=1, eval_every=3, eval_widths=(model.elastic.full(),)),
        tmp_path,
        validation=VALIDATION[:2],
    )
    assert modes == [False, True, True, True, False]
