"""Runs of training on several processes, for the tests: each process is forked, so that it need not import torch.

A case is a name and what it changes of `CONFIG`. A process runs its cases one after the other, and leaves in the folder
of each a JSON file of its own; rank 0 leaves the weights, too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_run
import torch
from processes import free_port
from test_tuning import fraction, router_of
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from flextron import ranks
from flextron.checkpoint import save_tensors
from flextron.data import windows
from flextron.recipes import TrainConfig, TuneConfig
from flextron.training import train
from flextron.tuning import tune

CONFIG = TrainConfig(
    steps=3,
    batch_size=5,
    length=12,
    accumulation=2,
    learning_rate=1e-2,
    warmup=0.4,
    clip=0.1,
    distillation=0.5,
    bf16=False,
    eval_every=3,
    checkpoint_every=0,
)
CASES: dict[str, dict[str, Any]] = {
    "replicas": {},
    "no-clip": {"clip": None, "accumulation": 1, "distillation": 0.0, "batch_size": 4},
    "tune-static": {"router": "static", "gates": "hard", "full_probability": 0.2},
    "tune-adaptive": {"router": "adaptive", "gates": "soft", "full_probability": 0.0, "distillation": 0.0},
}
SECONDS = 120
CONTEXT = multiprocessing.get_context("forkserver")


def exact(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    """The norm without transformers' float32 in between, where a row's rounding depends on its place in the batch."""
    return norm.weight * x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


@mock.patch.object(LlamaRMSNorm, "forward", exact)
def run(case: str, directory: Path) -> None:
    """Run a case and write what came of it."""
    directory.mkdir(parents=True, exist_ok=True)
    changes = dict(CASES[case])
    kind = changes.pop("router", None)
    config = (TuneConfig if kind else TrainConfig)(**asdict(CONFIG) | changes)
    model = tiny_run.elastic().double()
    options: dict[str, Any] = {"validation": windows(tiny_run.tokens(), 3, 12)}
    if config.distillation:
        options["teacher"] = tiny_run.parent(1).double()
    if kind:
        router = router_of(model, kind)
        report = tune(model, router, fraction, tiny_run.tokens(), config, directory, **options)
    else:
        report = train(model, tiny_run.tokens(), config, directory, **options)
    found = {"losses": report.losses, "evaluations": [r["sub_networks"] for r in report.evaluations]}
    (directory / f"rank-{ranks.now().rank}.json").write_text(json.dumps(found))
    weights = model.state_dict() | (
        {f"router.{k}": v for k, v in router.state_dict().items()} if kind else {}
    )
    if ranks.is_first():
        save_tensors(directory / "weights.safetensors", weights)


def start(size: int, root: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run all cases on ``size`` forked processes."""
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # for the server of forks
    CONTEXT.set_forkserver_preload(["sharded_run"])
    given = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    given |= {"LOCAL_WORLD_SIZE": str(size), "FLEXTRON_RANKS_TIMEOUT": "60", **(environment or {})}
    processes = [
        CONTEXT.Process(target=_process, args=({**given, "RANK": str(r), "LOCAL_RANK": str(r)}, root))
        for r in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size


def _process(environment: Mapping[str, str], root: Path) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with ranks.joined("train"):
        for case in CASES:
            run(case, root / case)
