"""A stage on several processes does what it does in one, and one process speaks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file


def answer(ended):
    """What the first process printed, where all have succeeded and the others are silent."""
    assert [e.rc for e in ended] == [0] * len(ended), [e.err for e in ended]
    assert all(e.out == e.err == "" for e in ended[1:])
    return json.loads(ended[0].out)


def test_convert_scores_each_part_and_sorts_as_one_process_does(processes, made, tmp_path):
    argv = ["convert", made / "parent", tmp_path / "new", "--data", made / "text.jsonl", "--json"]
    argv += ["--samples", 14, "--length", 16, "--device", "cpu"]
    report = answer(processes.run(3, argv))
    stored = json.loads((made / "elastic" / "flextron.json").read_text())
    assert report == {name: stored[name] for name in report}
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "new", made / "elastic"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_eval_weighs_the_parts_of_all_processes(processes, made):
    argv = ["eval", made / "elastic", "--data", made / "text.jsonl", "--json", "--device", "cpu"]
    argv += ["--budgets", "0.7,1", "--samples", 5, "--length", 16, "--rounds", 1]
    several, one = (answer(processes.run(size, argv)) for size in (3, 1))
    assert len(several) == len(one) > 1
    for a, b in zip(several, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        for name in ("kind", "target", "predicted_ms", "params", "mlp_widths", "kv_groups"):
            assert a[name] == b[name]


def test_train_reads_stores_and_resumes_shards_as_one_process_does_whole_models(processes, made, tmp_path):
    """The teacher of the run that goes on is not the checkpoint any more."""
    found = []
    for size in (2, 1):
        folder = shutil.copytree(made / "elastic", tmp_path / str(size))
        for steps in (2, 4):
            argv = ["train", folder, "--data", made / "text.jsonl", "--length", 16, "--batch-size", 4]
            argv += ["--distillation", 0.5, "--checkpoint-every", 1, "--steps", steps, "--device", "cpu"]
            argv += ["--no-bf16"]  # where the machine has it, a sum over processes rounds otherwise
            ended = processes.run(size, [*argv, *(["--shard", "full"] if size > 1 else [])])
            assert [e.rc for e in ended] == [0] * size, [e.err for e in ended]
        found.append(
            (load_file(folder / "model.safetensors"), json.loads((folder / "training/run.json").read_text()))
        )
    (ours, run), (theirs, alone) = found
    assert run["weights"] == alone["weights"] and run["teacher"]["weights"] == alone["teacher"]["weights"]
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5), name
    file = tmp_path / "2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    ended = processes.run(2, ["train", tmp_path / "2", "--length", 16, "--shard", "full", "--device", "cpu"])
    assert [e.rc for e in ended] == [2, 2]
    said = "".join(e.out + e.err for e in ended)
    assert "model.safetensors: sha256 must be" in said and said.count("\n") == 1


# how well the surrogate's network fits is another test's
ROUTE = """
import sys
from flextron import cli
from flextron.routing import adaptive

adaptive._SURROGATE_STEPS, adaptive._REFIT_STEPS = 20, 5
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("form", ["gumbel", "surrogate"])
def test_route_adds_up_the_gradients_of_all_processes(processes, made, tmp_path, form):
    found = []
    for size in (2, 1):
        folder = shutil.copytree(made / "elastic", tmp_path / str(size))
        argv = ["-c", ROUTE, "route", folder, "--adaptive", "--data", made / "text.jsonl"]
        argv += ["--form", form, "--steps", 3]
        argv += ["--prefill", 12] if form == "surrogate" else []
        argv += ["--samples", 40, "--length", 16, "--device", "cpu", "--targets", "0.6,0.8,1", "--json"]
        report = answer(processes.run(size, argv))
        found.append((report, load_file(folder / "adaptive.safetensors")))
    (several, ours), (one, theirs) = found
    assert several["full_loss"] == pytest.approx(one["full_loss"], rel=1e-6)
    steps = 1 if form == "surrogate" else len(one["history"])
    for a, b in zip(several["history"][:steps], one["history"][:steps], strict=True):
        assert a["latency_miss"] == pytest.approx(b["latency_miss"], rel=1e-4)
    if form == "surrogate":  # what it saw is the same; its steps of a fit make more of a rounding
        assert several["surrogate"]["observed"] == pytest.approx(one["surrogate"]["observed"], rel=1e-4)
        return
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["generate", "--prompt", "the cat"],
            "generate: processes must be 1 for generate, got 2; torchrun is for",
        ),
        (["route"], "route: processes must be 1 for route without --adaptive, got 2; torchrun is for"),
        (["eval", "--samples", "many"], "eval: --samples must be a whole number of at least 1, got many"),
        (["eval", "--samples", 1, "--length", 16], "eval: samples must be at least 2 for 2 processes, got 1"),
        (["train", "--device", "cuda"], "train: device must be one that "),
    ],
)
def test_a_refusal_is_said_once(processes, made, argv, sentence):
    data = ["--data", made / "text.jsonl"] if argv[0] in ("eval", "train") else []
    ended = processes.run(2, [argv[0], made / "elastic", *data, *argv[1:]])
    assert [e.rc for e in ended] == [2, 2]
    said = "".join(e.out + e.err for e in ended)
    assert said.startswith(f"flextron: {sentence}") and said.count("\n") == 1
