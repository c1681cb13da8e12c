"""Promises of a teacher's cached logits: its loss at k = V, a bound below, each window asked once, kills and damage."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from torch import Tensor

from flextron import ranks
from flextron.data import Batches, Mixture
from flextron.judge.objectives import TopLogits, distillation, distillation_from_top, top_logits
from flextron.training import resume, teacher, tensorboard, train
from flextron.training.loop import _multiplies_as_held
from flextron.training.teacher import TeacherLogits

CONFIG = replace(tiny_run.CONFIG, steps=6, teacher_logits=tiny_run.VOCAB, checkpoint_every=2, eval_every=0)


def pair(V: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(4 * torch.randn(2, 3, V, generator=draw, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def graded(loss: Any, z: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = loss(z, *args)
    value.backward()
    return value.detach(), z.grad


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_all_logits_are_the_whole_teacher(tau):
    student, asked = pair()
    wanted = graded(distillation, student, asked, tau)
    found = graded(distillation_from_top, student, top_logits(asked, 300, tau), tau)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)  # the cache is float32


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_top_and_the_rest_are_the_divergence_of_the_merged_distributions(tau):
    student, asked = pair()
    top = top_logits(asked, 7, tau)

    def merged(z: Tensor, _: TopLogits, tau: float) -> Tensor:
        p, q = ((x / tau).softmax(-1) for x in (asked, z))
        kept = torch.zeros_like(p).scatter(-1, top.indices.long(), 1.0)
        parts = [
            torch.cat([x.gather(-1, top.indices.long()), (x * (1 - kept)).sum(-1, True)], -1) for x in (p, q)
        ]
        return (parts[0] * (parts[0] / parts[1]).log()).sum(-1).mean() * tau**2

    for ours, plain in zip(
        graded(distillation_from_top, student, top, tau), graded(merged, student, top, tau), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-8)
    whole = distillation(student, asked, tau)
    losses = [distillation_from_top(student, top_logits(asked, k, tau), tau) for k in (1, 7, 60, 300)]
    assert losses == sorted(losses) and losses[0] < losses[2] <= whole * (1 + 1e-6)
    assert distillation_from_top(asked, top, tau).abs() < 1e-6


def test_a_rest_without_weight_teaches_that_it_has_none():
    student, asked = pair(50)
    asked[..., 5:] = -torch.inf
    found = graded(distillation_from_top, student, top_logits(asked, 5), 1.0)
    for ours, theirs in zip(found, graded(distillation, student, asked.clamp_min(-1e30), 1.0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_logits_of_other_positions_are_refused():
    student, asked = pair()
    with pytest.raises(ValueError, match=r"of the positions of student_logits \[2, 3\], got \[3\]"):
        distillation_from_top(student, top_logits(asked[0], 5))


def run(
    directory: Path, config: Any = CONFIG, steps: int | None = None, asked: Any = None, **options: Any
) -> Any:
    model, parent = tiny_run.elastic(), asked or tiny_run.parent(1)
    config = replace(config, steps=steps or config.steps)
    return train(model, tiny_run.tokens(), config, directory, teacher=parent, **options), model


class Counting:
    """A teacher that counts the windows that it is asked about."""

    def __init__(self) -> None:
        self.windows = 0
        self.parent = tiny_run.parent(1)
        self.parent.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: Any, args: Any, kwargs: Any) -> None:
        self.windows += len(kwargs["input_ids"])


def test_a_run_is_that_of_the_teacher_itself_to_rounding(tmp_path):
    live, one = run(tmp_path / "live", replace(CONFIG, teacher_logits=0))
    cached, other = run(tmp_path / "cached")
    assert live.losses == pytest.approx(cached.losses, rel=1e-5)
    for name, p in one.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), p, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("cached", [0, tiny_run.VOCAB])
def test_a_teacher_in_bfloat16_computes_in_float32(cached, bf16, tmp_path):
    """A run is that of the same weights in float32, to rounding; one whose teacher computes in bfloat16 is not.

    In a run in bfloat16 a CPU multiplies the weights as they are held, where autocast would round them.
    """
    config, losses = replace(CONFIG, steps=2, teacher_logits=cached, bf16=bf16), {}
    teachers = {
        "wide": tiny_run.elastic(seed=1),
        "narrow": tiny_run.elastic(seed=1),
        "bare": tiny_run.parent(1),
    }
    for name, asked in teachers.items():
        for p in asked.parameters():
            p.data = p.data.bfloat16() if name != "wide" else p.data.bfloat16().float()
        losses[name] = torch.tensor(run(tmp_path / name, config, asked=asked)[0].losses)
        held = json.loads((tmp_path / name / "run.json").read_text())["teacher"].get("held")
        assert held == ("bfloat16" if name == "narrow" else None)
    assert {p.dtype for p in teachers["narrow"].parameters()} == {torch.bfloat16}
    narrow, bare = ((losses[name] - losses["wide"]).abs().max() for name in ("narrow", "bare"))
    assert narrow < (1e-3 if bf16 else 1e-6), (narrow, bare)
    assert bf16 or bare > 4 * narrow, (narrow, bare)  # narrow is a rounding of the loss


def test_a_bfloat16_teacher_is_as_exact_as_autocast():
    """As it is held the weights are the same, and what is between them is rounded less."""
    held, wide = (tiny_run.elastic(seed=1).eval() for _ in range(2))
    for p, q in zip(held.parameters(), wide.parameters(), strict=True):
        p.data = p.data.bfloat16()
        q.data = p.data.float()
    assert _multiplies_as_held(held) and not _multiplies_as_held(wide)
    assert not _multiplies_as_held(tiny_run.parent(1).bfloat16())
    ids = tiny_run.tokens()[:48].view(4, 12)
    exact = copy.deepcopy(wide).double()(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        ours = held(input_ids=ids, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            theirs = wide(input_ids=ids, use_cache=False).logits
    assert (ours - exact).norm() <= 1.05 * (theirs - exact).norm()


def test_each_window_is_asked_once_and_a_longer_run_appends(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "_FILE_BYTES", 4 * 12 * (8 * 41 + 4))  # four windows a file
    counting, told = Counting(), []
    config = replace(CONFIG, checkpoint_every=1)
    run(tmp_path, config, 3, counting.parent, cached=lambda *call: told.append(call))
    assert counting.windows == 12 and told == [(4, 12), (8, 12), (12, 12)]
    whole = {p: p.read_bytes() for p in sorted((tmp_path / teacher.FOLDER).iterdir())}
    assert len(whole) == 6
    run(tmp_path, config, 4, counting.parent)
    assert counting.windows == 16
    assert all(path.read_bytes() == content for path, content in whole.items())
    # more draws than the 58 windows of the text
    run(tmp_path, config, 20, counting.parent)
    assert counting.windows == 58


def test_what_a_kill_or_damage_left_is_computed_again_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "_FILE_BYTES", 4 * 12 * (8 * 41 + 4))
    folder = tmp_path / "run" / teacher.FOLDER

    def kill(done: int, _: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    whole, model = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", cached=kill)
    assert len(list(folder.iterdir())) == 4
    damaged = folder / "000001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (folder / "000002.safetensors").write_bytes(b"half")
    counting = Counting()
    report, other = run(tmp_path / "run", asked=counting.parent)
    assert counting.windows == 24 - 4 and report.losses == whole.losses
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in model.named_parameters())
    # another teacher's are not taken for this one's
    counting = Counting()
    with torch.no_grad():
        counting.parent.model.norm.weight.mul_(1.5)
    report, _ = run(tmp_path / "run", asked=counting.parent, resume=False)
    assert counting.windows == 24 and report.losses != whole.losses


def test_rows_of_a_mixture_are_those_of_its_windows(tmp_path):
    streams = [torch.arange(60) % 41, torch.arange(100) * 3 % 41]
    batches = Batches(Mixture(streams, (1.0, 3.0)), 4, 10)
    table = torch.randn(41, 41, generator=torch.Generator().manual_seed(0))
    top = TeacherLogits(tmp_path, batches, 40, 3, {})
    top.fill(lambda windows: table[windows], 4, 1.0, None)
    for _ in range(10):
        batch = next(batches)
        for ours, theirs in zip(top.read(batches.last), top_logits(table[batch], 3), strict=True):
            assert torch.equal(ours, theirs)


def test_processes_share_the_files_and_ask_equally_often(tmp_path, monkeypatch):
    """Rank after rank, with what the first found to be missing: a stand-in for processes side by side."""
    monkeypatch.setattr(
        teacher, "_FILE_BYTES", 3 * 12 * (8 * 2 + 4)
    )  # three windows a file, the last has one
    batches = Batches(tiny_run.tokens(), 4, 12)
    table = torch.randn(41, 41, generator=torch.Generator().manual_seed(0))
    calls: list[list[int]] = [[], [], []]
    for rank in (0, 1, 2):
        if rank:
            monkeypatch.setattr(teacher.ranks, "shared", lambda _: [0, 1, 2, 3, 4, 5])
        monkeypatch.setattr(teacher.ranks, "now", lambda rank=rank: ranks.ALONE._replace(rank=rank, size=3))
        monkeypatch.setattr(teacher.ranks, "is_first", lambda rank=rank: rank == 0)
        monkeypatch.setattr(teacher.ranks, "agree", lambda *_: None)
        top = TeacherLogits(tmp_path, batches, 16, 2, {})
        top.fill(lambda windows, rank=rank: calls[rank].append(len(windows)) or table[windows], 2, 1.0, None)
        assert len(list((tmp_path / teacher.FOLDER).glob("*.json"))) == 2 * (rank + 1)
    assert [len(c) for c in calls] == [4, 4, 4] and sum(map(sum, calls)) == 16 + 1
    for draw in range(16):
        for ours, theirs in zip(top.read([draw]), top_logits(table[batches.window(draw)], 2), strict=True):
            assert torch.equal(ours[0], theirs)


def test_bad_input_is_one_sentence_and_changes_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="train: teacher_logits must be at most the vocabulary, 41, got 42"):
        run(tmp_path / "run", replace(CONFIG, teacher_logits=42))
    full = shutil._ntuple_diskusage(10, 10, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(
        ValueError, match=r"must have room for the teacher's 41 largest logits .* 0\.0 GB free"
    ):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_cleaning_removes_them(tmp_path):
    run(tmp_path, steps=2)
    assert {p.name for p in resume.clean(tmp_path)} >= {"000000.json", "000000.safetensors"}
    left = {p.name for p in tmp_path.iterdir()} - {tensorboard.FOLDER}
    assert left == {"metrics.jsonl", "run.json"}


def test_a_run_of_a_version_without_the_option_goes_on(tmp_path):
    config = replace(CONFIG, teacher_logits=0)
    run(tmp_path, config, 2)
    path = tmp_path / resume.RUN_FILE
    found = resume.read_json(path)
    assert found["config"].pop("teacher_logits") == 0
    resume.write_json(path, found)
    assert run(tmp_path, config, 2)[0].resumed_from == 2
    with pytest.raises(ValueError, match=r"got --teacher-logits \d+ instead of 0"):
        run(tmp_path, CONFIG, 2)
