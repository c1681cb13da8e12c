"""The script of a GPU visit, as far as a machine without a GPU can tell: its steps, and whole models with stand-ins."""

import csv
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "python" / "benchmarks" / "gpu_check.sh"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *arguments], env=os.environ | environment, capture_output=True, text=True
    )


def test_a_dry_run_names_every_step_and_does_nothing(tmp_path):
    done = run("--dry-run", OUT=str(tmp_path / "out"))
    assert done.returncode == 0 and not done.stderr
    for step in (
        "device",
        "library",
        "model, graph",
        "model, llama8b",
        "words",
        "tests, sm_90",
        "tests, sm_80",
        "memcheck, ops",
        "bench",
        "plot",
    ):
        assert f"\n{step} " in f"\n{done.stdout}"
    assert not (tmp_path / "out").exists()
    names = [line[:22].strip() for line in done.stdout.splitlines()]
    assert names[3].startswith("model, ")  # what was never measured comes first
    models, ops = (run("--dry-run", part).stdout for part in ("--models", "--ops"))
    assert "model, " in models and "words" not in models and "model, " not in ops and "words" in ops


def test_a_pattern_that_is_missing_or_matches_no_step_is_one_sentence():
    for arguments, says in (
        (["--only"], "have a pattern, got none"),
        (["--only", "zzz"], "match a step of --dry-run, got zzz"),
    ):
        done = run(*arguments, "--dry-run")
        assert (done.returncode, done.stderr) == (2, f"gpu_check: --only must {says}\n")
    assert run("--only", "graph", "--dry-run").returncode == 0


def test_whole_models_are_checked_and_timed_on_a_cpu_with_stand_ins(tmp_path, processes):
    """The very code of a visit: a line for each check, and a row of figures for everyone who is there."""
    python = tmp_path / "python"  # notes what it is to run, which is then run without Python's own seconds
    python.write_text('#!/bin/sh\necho "$FLEXTRON_COMMIT $PYTHONPATH $*" >>"$OUT/asked.txt"\n')
    python.chmod(0o755)
    done = run("--cpu", OUT=str(tmp_path), PYTHON=str(python))
    assert done.returncode == 0, (tmp_path / "log.txt").read_text()
    printed = ""
    for line in (tmp_path / "asked.txt").read_text().splitlines():
        commit, path, *argv = line.split()
        paths = [str(ROOT / argv[0].rpartition("/")[0]), *path.split(":")]
        code = f"import runpy, sys; sys.path[:0], sys.argv = {paths}, sys.argv[2:]; "
        asked = ["-c", f"{code}runpy.run_path(sys.argv[0], run_name='__main__')", *argv]
        ended = processes.alone(asked, FLEXTRON_COMMIT=commit)
        assert ended.rc == 0, ended.err
        printed += ended.out
    for said in (
        "tokens of the graph are eager's",
        "one captured graph served ten budgets",
        "losses of two steps",
        "a CPU's peak is not measured",
        "prefill of 32 tokens",
        "vLLM is not installed",
    ):
        assert said in printed
    with (tmp_path / "models.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    who = {"flextron, graph", "flextron, eager", "transformers", "transformers, static + compile"}
    assert {(row["who"], row["width"], row["batch"]) for row in rows} == {
        (name, width, batch) for name in who for width in ("1", "0.5") for batch in ("1", "2")
    }
    assert all(float(row["prefill"]) > 0 and row["machine"] and row["commit"] for row in rows)


def test_every_command_of_the_benchmarks_is_one_they_take():
    from test_bench import bench_ops

    lines = [
        line.split(" bench ")[1] for line in run("--dry-run").stdout.splitlines() if " s  bench " in line
    ]
    assert len(lines) == 6
    from test_bench_model import loaded

    steps = run("--dry-run").stdout + run("--dry-run", "--cpu").stdout
    of_models = [line.split("generation ")[1] for line in steps.splitlines() if " s  generation " in line]
    assert len(of_models) == 7
    for line in of_models:
        loaded("bench_model").parse(f"--model {line}".split())
    asked = {
        name
        for line in steps.splitlines()
        if " s  models " in line
        for name in line.split("models ")[1].split()
    }
    assert asked == {*loaded("check_model").CHECKS}
    for line in lines:
        bench_ops.parse(line.split()[1:])  # without the architecture


def test_a_bad_argument_or_no_gpu_is_one_sentence(tmp_path):
    bad = run("--fast")
    assert bad.returncode == 2 and re.search("must be --models, --ops, .* or nothing, got --fast", bad.stderr)
    no_gpu = run("--ops", "--cpu")
    assert no_gpu.returncode == 2 and "--ops must have a GPU, got --cpu" in no_gpu.stderr
    if shutil.which("nvidia-smi") is None:
        none = run(OUT=str(tmp_path))
        assert none.returncode == 2 and "must have a GPU" in none.stderr


def test_a_failing_step_does_not_stop_the_next(tmp_path):
    """With stand-ins for the machine's tools: every step fails or is not run, and each has its line."""
    for name in ("nvidia-smi", "python"):
        (tmp_path / name).write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    for name in ("nvcc", "compute-sanitizer"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(OUT=str(out), PYTHON=str(tmp_path / "python"), PATH=path)
    assert done.returncode == 1, done.stderr
    dry = [line for line in run("--dry-run").stdout.splitlines() if line]
    summary = (out / "summary.txt").read_text().splitlines()
    assert len(summary) == len(dry) + 1
    assert all("FAILED" in line or "not run" in line for line in summary[:-1])
    assert "broken" in (out / "log.txt").read_text()


def test_it_is_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not here")
    subprocess.run(["shellcheck", SCRIPT], check=True)
