"""The script of a GPU visit, as far as a machine without a GPU can tell: it parses, and says what it would do."""

import os
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
        "words",
        "tests, sm_90",
        "tests, sm_80",
        "memcheck, ops",
        "bench",
        "plot",
    ):
        assert f"\n{step} " in f"\n{done.stdout}"
    assert not (tmp_path / "out").exists()


def test_every_command_of_the_benchmarks_is_one_they_take():
    from test_bench import bench_ops

    lines = [
        line.split(" bench ")[1] for line in run("--dry-run").stdout.splitlines() if " s  bench " in line
    ]
    assert len(lines) == 6
    for line in lines:
        bench_ops.parse(line.split()[1:])  # without the architecture


def test_a_bad_argument_or_no_gpu_is_one_sentence(tmp_path):
    bad = run("--fast")
    assert bad.returncode == 2 and "must be --dry-run, --only, --pack or nothing, got --fast" in bad.stderr
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
