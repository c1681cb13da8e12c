"""`flextron serve` becomes vLLM's server, once a sentence has said what is wrong."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from serving.checkpoint import build

from flextron.cli import main, serve


@pytest.fixture(scope="module")
def elastic(tmp_path_factory):
    return build(tmp_path_factory.mktemp("served") / "elastic")


@pytest.fixture
def started(monkeypatch):
    """The commands that would run, where vLLM is installed."""
    found: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(serve.os, "execv", lambda path, command: found.append(command))
    monkeypatch.setattr(serve, "_has_gpu", lambda: False)
    return found


def test_the_command_is_vllms_own(elastic, started):
    line = ["serve", str(elastic), "--budget", "0.7", "--port", "81", "--vllm", "--max-num-seqs", "4"]
    assert main(line) == 0
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    given = dict(zip(command[3::2], command[4::2], strict=True))
    assert json.loads(given.pop("--hf-overrides")) == {"flextron_budget": 0.7}
    assert given == {
        "--model": str(elastic),
        "--host": "127.0.0.1",
        "--port": "81",
        "--dtype": "float32",
        "--middleware": serve.MIDDLEWARE,
        "--max-num-seqs": "4",
    }
    module, _, name = serve.MIDDLEWARE.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "0.01"], "budget: fraction must be at least"),
        (["--budget", "2"], "budget: budget must be in (0, 1], got 2"),
        (["--latency-ms", "0.001"], "budget: latency_ms must be at least"),
    ],
)
def test_an_impossible_budget_starts_nothing(elastic, started, capsys, options, said):
    assert main(["serve", str(elastic), *options]) == 2
    assert said in capsys.readouterr().err and not started


def test_vllm_must_be_there(elastic, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["serve", str(elastic)]) == 2
    assert "vLLM must be installed beside flextron" in capsys.readouterr().err
