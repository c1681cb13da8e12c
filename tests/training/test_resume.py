"""Promises of resuming: a killed run ends where it would have ended, and damage is told, never trained on."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch

from flextron.checkpoint import CheckpointError, load_tensors, save_tensors
from flextron.training import learning_rate, tensorboard, train

LAST = "step-00000012"

# Moments to kill at: between two checkpoints; before a checkpoint's tensors have their place; before the very
# first checkpoint counts, as its tensors are there and its record is not.
MOMENTS = {
    "between": ("stop-after-step", "8"),
    "tensors": ("stop-before-file", "step-00000009"),
    "first": ("stop-before-file", "step-00000003.json"),
}


TINY_RUN = "import sys, tiny_run; tiny_run.main(*sys.argv[2:])"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, processes):
    """Folders of one run: undisturbed ("whole"), and killed at each moment, then resumed."""
    root = tmp_path_factory.mktemp("runs")
    processes.load("tiny_run")
    for name, command in MOMENTS.items():
        process = processes.start_alone(["-c", TINY_RUN, *command, root / name])
        processes.ready(0, "waiting\n")
        os.kill(process, signal.SIGKILL)
        assert [ended.rc for ended in processes.wait()] == [-signal.SIGKILL]
        shutil.copytree(root / name, root / f"{name}-as-killed")
    done = processes.alone(["-c", TINY_RUN, "run", root / "whole", *(root / name for name in MOMENTS)])
    assert done.rc == 0, done.err
    return root


def metrics(directory: Path) -> list[dict]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s", "peak_bytes")} for r in records
    ]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_resumes_bit_for_bit(runs, moment):
    whole, resumed = stored(runs / "whole" / LAST), stored(runs / moment / LAST)
    assert whole.keys() == resumed.keys()
    for kind in ("model.", "optimizer.", "sampler"):
        assert any(name.startswith(kind) for name in whole)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    positions = [
        json.loads((runs / name / "step-00000012.json").read_text())["position"] for name in ("whole", moment)
    ]
    assert positions == [{"drawn": 48}] * 2
    assert metrics(runs / "whole") == metrics(runs / moment)


def test_kill_really_came_in_the_middle(runs):
    def saved(moment):
        return sorted(p.name for p in (runs / f"{moment}-as-killed").glob("step-*"))

    assert saved("between") == sorted(f"step-{n:08d}{s}" for n in (3, 6) for s in ("", ".json"))
    assert len(metrics(runs / "between-as-killed")) > 8
    assert saved("tensors") == saved("between")
    assert list((runs / "tensors-as-killed").glob(".step-*.tmp"))
    assert saved("first") == ["step-00000003"]


def test_two_checkpoints_are_kept_and_no_litter(runs):
    for moment in ("whole", *MOMENTS):
        names = sorted(p.name for p in (runs / moment).iterdir() if p.name != tensorboard.FOLDER)
        expected = [f"step-{n:08d}{s}" for n in (9, 12) for s in ("", ".json")]
        assert names == sorted([*expected, "metrics.jsonl", "run.json"])


def test_every_step_is_logged_once(runs):
    records = metrics(runs / "between")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in records if "sub_networks" in r] == [0, 5, 10, 12]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that one process wrote."""
    (file,) = folder.iterdir()
    return load_tensors(file)


def contents(directory: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def finished(runs, tmp_path):
    return Path(shutil.copytree(runs / "whole", tmp_path / "run"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
@pytest.mark.parametrize("suffix", ["/shard-00001-model-00001-of-00001.safetensors", ".json"])
def test_damaged_checkpoint_is_passed_over_and_named(runs, finished, damage, suffix):
    if (damage, suffix) == (flip_a_bit, ".json"):
        (finished / "step-00000012.json").write_text('{"step": 11, "position": {"drawn": 0}, "sha256": "0"}')
    else:
        damage(finished / f"step-00000012{suffix}")
    with pytest.warns(UserWarning, match=f"passing over the checkpoint of step 12: .*step-00000012{suffix}"):
        tiny_run.run(finished)
    whole, resumed = stored(runs / "whole" / LAST), stored(finished / LAST)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert metrics(runs / "whole") == metrics(finished)


@pytest.mark.filterwarnings("ignore:train. passing over")
def test_no_intact_checkpoint_is_an_error_that_changes_nothing(finished):
    for path in finished.glob("step-*/*.safetensors"):
        flip_a_bit(path)
    before = contents(finished)
    with pytest.raises(CheckpointError, match=r"intact checkpoint to resume from, got .*sha256.*--restart"):
        tiny_run.run(finished)
    assert before == contents(finished)


def test_a_damaged_record_of_a_run_changes_nothing_and_names_what_starts_afresh(finished):
    (finished / "step-x.json").write_text("no step of ours")
    longer = replace(tiny_run.CONFIG, steps=13)
    for name, says in (
        ("metrics.jsonl", "line 1 must be a JSON object"),
        ("run.json", "a JSON file.*--restart"),
    ):
        content = (finished / name).read_bytes()
        (finished / name).write_text("{\n{\n")
        before = contents(finished)
        with pytest.raises(CheckpointError, match=f"{name}: .*{says}"):
            train(tiny_run.elastic(), tiny_run.tokens(), longer, finished, teacher=tiny_run.parent(1))
        assert before == contents(finished)
        (finished / name).write_bytes(content)


def test_finished_run_is_not_run_again(finished):
    calls = []
    model = tiny_run.run(finished, lambda *call: calls.append(call))
    assert not calls
    weights = stored(finished / LAST)
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[f"model.{name}"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"learning_rate": 1e-3, "seed": 3},
            "--learning-rate 0.001 instead of 0.003, --seed 3 instead of 0;",
        ),
        ({"bf16": True}, "--bf16 True instead of False;"),
    ],
)
def test_another_configuration_is_refused(finished, change, named):
    config = replace(tiny_run.CONFIG, **change)
    with pytest.raises(ValueError, match=f"must be resumed as it was started, got {named}"):
        train(tiny_run.elastic(), tiny_run.tokens(), config, finished, teacher=tiny_run.parent(1))


def test_other_data_model_or_teacher_is_refused(finished):
    model, data, teacher = tiny_run.elastic(), tiny_run.tokens(), tiny_run.parent(1)
    wider, query = tiny_run.parent(1, intermediate_size=32), tiny_run.elastic("query")
    for arguments, named in (
        ((model, data + 0 * data + (data == 1), teacher), r"other tokens \(--data\);"),
        ((query, data, teacher), "another model;"),
        ((model, data, wider), "another teacher;"),
        ((model, data, tiny_run.parent(2)), "another teacher;"),
    ):
        with pytest.raises(ValueError, match=f"as it was started, got {named}"):
            train(arguments[0], arguments[1], tiny_run.CONFIG, finished, teacher=arguments[2])


def test_another_models_weights_are_not_replaced(finished):
    for damage in (lambda p: p.mul_(1.001), lambda p: p.copy_(p.flip(0))):
        model = tiny_run.elastic()
        with torch.no_grad():
            damage(model.model.layers[0].mlp.up_proj.weight)
        with pytest.raises(
            ValueError, match=r"must be resumed with the weights it started from or saved, got another"
        ):
            train(model, tiny_run.tokens(), tiny_run.CONFIG, finished, teacher=tiny_run.parent(1))


def test_trained_model_is_known_as_the_runs_own(finished):
    model = tiny_run.run(finished)
    report = train(model, tiny_run.tokens(), tiny_run.CONFIG, finished, teacher=tiny_run.parent(1))
    assert report.resumed_from == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trained_model_that_was_stored_rounded_is_known_and_goes_on_unrounded(tmp_path, dtype):
    config = replace(tiny_run.CONFIG, steps=2, distillation=0.0, warmup=0.0, min_lr_ratio=1.0)
    model = tiny_run.elastic()
    train(model, tiny_run.tokens(), config, tmp_path / "run")
    for p in model.parameters():
        p.data = p.data.to(dtype).float()
    assert train(model, tiny_run.tokens(), config, tmp_path / "run").resumed_from == 2
    for p in model.parameters():
        p.data = p.data.to(dtype).float()
    train(model, tiny_run.tokens(), replace(config, steps=3), tmp_path / "run")
    train(tiny_run.elastic(), tiny_run.tokens(), replace(config, steps=3), tmp_path / "whole")
    a, b = weights_of(tmp_path / "run"), weights_of(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_changes_no_weight_may_change(finished):
    model = tiny_run.elastic()
    config = replace(
        tiny_run.CONFIG, eval_every=3, checkpoint_every=7, eval_widths=(model.elastic.smallest(),)
    )
    report = train(model, tiny_run.tokens(), config, finished, teacher=tiny_run.parent(1))
    assert report.resumed_from == 12


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return stored(max(directory.glob("step-*[0-9]")))


@pytest.mark.parametrize("constant", [True, False])
def test_more_steps_go_on_from_a_finished_run(tmp_path, constant):
    """At a constant rate bit for bit as one long run; else each new step has the rate that it has in such a run."""
    rates = {"warmup": 0.0, "min_lr_ratio": 1.0} if constant else {}
    short = replace(tiny_run.CONFIG, steps=4, distillation=0.0, **rates)
    long = replace(short, steps=7)
    model = tiny_run.elastic()
    for config, resumed in ((short, 0), (long, 4), (long, 7)):
        report = train(model, tiny_run.tokens(), config, tmp_path / "extended")
        assert report.resumed_from == resumed and len(report.losses) == config.steps
    train(tiny_run.elastic(), tiny_run.tokens(), long, tmp_path / "whole")
    logged = metrics(tmp_path / "extended")
    assert [r["learning_rate"] for r in logged] == [
        learning_rate(short if step <= 4 else long, step) for step in range(1, 8)
    ]
    a, b = weights_of(tmp_path / "extended"), weights_of(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a) == constant
    run = json.loads((tmp_path / "extended" / "run.json").read_text())
    assert run["config"]["steps"] == 7
    assert [(e["step"], e["steps"]) for e in run["extended"]] == [(4, 4)]


def test_a_longer_run_that_is_killed_goes_on_from_the_weights_of_the_shorter(tmp_path):
    """What the user has until it ends are those, when their checkpoint is long gone."""
    short = replace(tiny_run.CONFIG, steps=2, distillation=0.0, checkpoint_every=1)
    model, long = tiny_run.elastic(), replace(short, steps=6)
    train(model, tiny_run.tokens(), short, tmp_path)
    stored = copy.deepcopy(model)
    train(model, tiny_run.tokens(), long, tmp_path)
    (tmp_path / "step-00000006.json").unlink()  # killed before its last step was written
    assert train(stored, tiny_run.tokens(), long, tmp_path).resumed_from == 5


def test_fewer_steps_are_refused(finished):
    config = replace(tiny_run.CONFIG, steps=11)
    with pytest.raises(ValueError, match=r"got --steps 11 instead of 12;"):
        train(tiny_run.elastic(), tiny_run.tokens(), config, finished, teacher=tiny_run.parent(1))


def test_a_run_of_an_earlier_version_goes_on(runs, finished):
    """It has one file for a step, with torch's generators and tied weights twice, and fewer settings."""
    for step in (9, 12):
        folder = finished / f"step-{step:08d}"
        tensors = stored(folder) | {"rng.cpu": torch.get_rng_state()}
        tensors["model.lm_head.weight"] = tensors["model.model.embed_tokens.weight"]
        meta = json.loads(folder.with_suffix(".json").read_text())
        meta["sha256"] = save_tensors(folder.with_suffix(".safetensors"), tensors)
        folder.with_suffix(".json").write_text(json.dumps(meta))
        shutil.rmtree(folder)
    run = json.loads((finished / "run.json").read_text())
    del run["config"]["widths_per_rank"]
    (finished / "run.json").write_text(json.dumps(run))
    (finished / "step-00000012.json").unlink()
    tiny_run.run(finished)
    whole, resumed = stored(runs / "whole" / LAST), stored(finished / LAST)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resume_false_begins_again(finished):
    config = replace(tiny_run.CONFIG, steps=2, distillation=0.0)
    report = train(tiny_run.elastic(), tiny_run.tokens(), config, finished, resume=False)
    assert report.resumed_from == 0
    assert len(report.losses) == 2
    assert sorted(p.name for p in finished.glob("step-*")) == [
        "step-00000002",
        "step-00000002.json",
    ]
