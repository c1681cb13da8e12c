"""Training on several processes that are killed, in a full disk, in a directory of another run, and on other inputs.

Whatever happens, one process says so in one sentence within seconds, and the same command ends with the same bytes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from folders import digest

from flextron.checkpoint import locked

CASES = int(os.environ.get("FLEXTRON_KILL_CASES", "2"))
STEPS = 8
LIMIT = 30.0  # seconds from a kill to the end of all processes; a hang is what fails it
KINDS = ("one", "saving", "all")


def command(folder: Path, made: Path, *more) -> list:
    argv = [
        "train",
        folder,
        "--data",
        made / "text.jsonl",
        "--steps",
        STEPS,
        "--batch-size",
        4,
        "--length",
        16,
    ]
    return [*argv, "--checkpoint-every", 1, "--eval-every", 4, "--device", "cpu", *more]


def trained(folder: Path) -> tuple[str, list]:
    """The bytes of the weights, and every step's loss and every evaluation."""
    lines = [json.loads(line) for line in (folder / "training" / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "gradient_norm", "size", "sub_networks")
    return digest_of(folder / "model.safetensors"), [[line.get(name) for name in kept] for line in lines]


def digest_of(file: Path) -> str:
    return file.read_bytes().hex()


@pytest.fixture(scope="module")
def undisturbed(processes, made, tmp_path_factory):
    folder = shutil.copytree(made / "elastic", tmp_path_factory.mktemp("undisturbed") / "elastic")
    assert [e.rc for e in processes.run(2, command(folder, made))] == [0, 0]
    return trained(folder)


def steps_in(folder: Path) -> int:
    """Steps that are done."""
    metrics = folder / "training" / "metrics.jsonl"
    return metrics.read_bytes().count(b'"gradient_norm"') if metrics.is_file() else 0


def saved_in(folder: Path) -> int:
    """The last step that counts as saved."""
    return max((int(p.stem[5:]) for p in (folder / "training").glob("step-*.json")), default=0)


def until_saving(folder: Path, rng: random.Random) -> None:
    """Wait for a moment at which a checkpoint is being written."""
    after = rng.randrange(1, STEPS - 2)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if steps_in(folder) > after:
            while time.monotonic() < deadline and steps_in(folder) < STEPS - 1:
                if any(name.startswith(".") for name in os.listdir(folder / "training")):
                    return
            return
        time.sleep(0.002)


def until_step(folder: Path, rng: random.Random) -> None:
    """Wait for a moment in a step that is not the last."""
    after, deadline = rng.randrange(1, STEPS - 2), time.monotonic() + LIMIT
    while steps_in(folder) < after and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(rng.random() * 0.05)


@pytest.mark.parametrize("case", range(CASES))
def test_a_killed_run_says_so_and_resumes_to_the_same_bytes(case, processes, made, undisturbed, tmp_path):
    rng, kind = random.Random(case), KINDS[case % len(KINDS)]
    folder = shutil.copytree(made / "elastic", tmp_path / "elastic")
    pids = processes.start(2, command(folder, made))
    (until_saving if kind == "saving" else until_step)(folder, rng)
    killed = {"one": [rng.randrange(2)], "saving": [0], "all": [0, 1]}[kind]
    for rank in killed:
        os.kill(pids[rank], signal.SIGKILL)
    at, saved = time.monotonic(), saved_in(folder)
    ended = processes.wait(LIMIT)
    seconds = time.monotonic() - at
    assert [e.rc for e in ended] == [-signal.SIGKILL if rank in killed else 2 for rank in range(2)]
    said = [line for e in ended for line in e.err.splitlines() if line.startswith("flextron: ")]
    gone = (
        f"flextron: train: all 2 processes must stay alive, got rank {killed[0]} gone; start the same command again "
        "to resume from the last checkpoint"
    )
    assert said == ([] if kind == "all" else [gone])
    print(f"{kind}: at step {saved}, told after {seconds:.2f} s")
    again = processes.run(2, command(folder, made, "--json"))
    assert [e.rc for e in again] == [0, 0], [e.err for e in again]
    assert json.loads(again[0].out)["resumed_from"] >= saved
    assert trained(folder) == undisturbed


def refused(ended, sentence):
    """Every process ends with code 2, and one of them says this."""
    assert [e.rc for e in ended] == [2] * len(ended), [e.err for e in ended]
    said = [line for e in ended for line in e.err.splitlines() if line.startswith("flextron: ")]
    assert len(said) == 1 and said[0].startswith(f"flextron: {sentence}"), said
    assert not any("Traceback" in e.err for e in ended)


def test_a_full_disk_leaves_the_model_as_it_was(processes, made, tmp_path):
    folder = shutil.copytree(made / "elastic", tmp_path / "elastic")
    before = digest(folder)
    ended = processes.run(2, command(folder, made), room=20_000)
    refused(ended, "train: a checkpoint must be written whole, got ")
    shutil.rmtree(folder / "training")
    assert digest(folder) == before
    argv = ["convert", made / "parent", tmp_path / "new", "--data", made / "text.jsonl"]
    argv += ["--samples", 14, "--length", 16, "--device", "cpu"]
    whole = f"{tmp_path / 'new' / '.staged' / 'model.safetensors'}: must be written whole, got "
    refused(processes.run(2, argv, room=20_000), whole)
    assert not (tmp_path / "new").exists()


def test_a_directory_that_another_run_writes_to_is_left_alone(processes, made, tmp_path):
    folder = shutil.copytree(made / "elastic", tmp_path / "elastic")
    with locked(folder, "train"):
        before = digest(folder)
        ended = processes.run(2, command(folder, made))
        assert digest(folder) == before
    refused(ended, f"train: {folder} must have one writer at a time, got process {os.getpid()} on")


OTHER = """
import os, sys
from flextron import cli
from flextron.training import loop

if os.environ["RANK"] == "1":
    if sys.argv[2] == "steps":
        sys.argv[sys.argv.index("--steps") + 1] = "9"
    else:  # a folder of tokens that another machine has in another version
        loop.checksum_of = lambda tokens: "another"
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("what", ["steps", "tokens"])
def test_processes_with_other_arguments_or_other_data_are_refused(processes, made, tmp_path, what):
    folder = shutil.copytree(made / "elastic", tmp_path / "elastic")
    before = digest(folder)
    ended = processes.run(2, ["-c", OTHER, what, *command(folder, made)])
    refused(ended, f"train: {what} must be the same on all 2 processes, got ")
    assert digest(folder) == before


def test_no_gpu_leaves_the_directory_alone(processes, made):
    before = digest(made / "elastic")
    ended = processes.run(2, ["train", made / "elastic", "--device", "cuda"], CUDA_VISIBLE_DEVICES="")
    refused(ended, "train: device must be one that can be used here, got cuda, but ")
    assert digest(made / "elastic") == before
