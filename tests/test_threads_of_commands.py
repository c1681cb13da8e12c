"""The command line computes with as many threads as it may use, and they give way to other programs."""

from __future__ import annotations

import os
import sys

import pytest

from flextron.cli.threads import quota, settle


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a\n", {"a/cpu.max": "50000 100000\n"}, 1),
        ("0::/a\n", {}, None),
        (
            "3:memory:/m\n2:cpu,cpuacct:/c\n0::/\n",
            {"cpu,cpuacct/c/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/c/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_a_quota_is_read_from_control_groups(groups, files, wanted, tmp_path):
    own, root = tmp_path / "own", tmp_path / "root"
    own.write_text(groups)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert quota(root, own) == wanted


def test_there_is_no_quota_without_control_groups(tmp_path):
    assert quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux'")
def test_threads_follow_the_quota_unless_they_are_asked_for(monkeypatch):
    monkeypatch.setattr("flextron.cli.threads.quota", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "7")
    settle()
    assert os.environ["OMP_NUM_THREADS"] == os.environ["GOMP_SPINCOUNT"] == "7"
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name)
    settle()
    assert os.environ["OMP_NUM_THREADS"] == "1" and int(os.environ["GOMP_SPINCOUNT"]) <= 10000
    monkeypatch.setattr("flextron.cli.threads.quota", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS")
    settle()
    assert "OMP_NUM_THREADS" not in os.environ
