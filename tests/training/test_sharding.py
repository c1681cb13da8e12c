"""Promises of training on several processes: the run is one process's, however its rows and weights are spread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sharded_run
import torch

from flextron.checkpoint import load_tensors

SIZES = (2, 3, 4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folders of every case, run by one process and by several."""
    root = tmp_path_factory.mktemp("sharded")
    for case in sharded_run.CASES:
        sharded_run.run(case, root / "1" / case)
    return root


@pytest.fixture(scope="module", params=SIZES)
def several(request, root):
    sharded_run.start(request.param, root / str(request.param))
    return root / str(request.param)


def told(directory: Path, rank: int = 0) -> dict:
    return json.loads((directory / f"rank-{rank}.json").read_text())


def logged(directory: Path) -> list[dict]:
    """What depends on no clock, line by line."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in r.items() if isinstance(v, int | float)} for r in records]
    clock = ("seconds", "tokens_per_s", "peak_bytes")
    return [
        {k: v for k, v in own.items() if k not in clock} | r.get("loss_by_size", {})
        for own, r in zip(numbers, records, strict=True)
    ]


@pytest.mark.parametrize("case", sharded_run.CASES)
def test_loss_gradient_and_weights_are_those_of_one_process(root, several, case):
    one, many = root / "1" / case, several / case
    # routers compute in float32
    close = {"rel": 1e-5, "abs": 1e-5} if case.startswith("tune") else {"rel": 1e-9, "abs": 1e-10}
    for a, b in zip(logged(one), logged(many), strict=True):
        assert b == pytest.approx(a, **close)
    weights, found = (load_tensors(d / "weights.safetensors") for d in (one, many))
    for name, value in weights.items():
        assert torch.allclose(found[name], value, rtol=close["rel"], atol=close["abs"]), name
    for a, b in zip(told(one)["evaluations"], told(many)["evaluations"], strict=True):
        assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], **close)
    assert all(told(many, rank) == told(many) for rank in range(int(several.name)))
