"""Runs of training on several processes, for the tests.

Each process leaves in the folder of a run a JSON file of its own; rank 0 leaves the weights, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_run
import torch
from processes import Processes
from test_tuning import fraction, router_of
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from flextron import ranks
from flextron.artefacts.directory import ElasticDirectory
from flextron.artefacts.elastic_model import make_elastic, save_elastic
from flextron.checkpoint import save_tensors
from flextron.checkpoint.weights import overwrite, save_weights
from flextron.data import windows
from flextron.recipes import TrainConfig, TuneConfig
from flextron.training import train
from flextron.training.resume import fingerprint
from flextron.training.sharding import cut_of, first_with_weights, full
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
# name -> (numbers of processes, what it changes of CONFIG)
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "replicas": ((2,), {"shard": "none"}),
    "full": ((3,), {"shard": "full", "stored": True}),
    "hybrid": ((4,), {"shard": "hybrid", "stored": True, "tie_word_embeddings": False}),
    "recomputed": ((2,), {"shard": "full", "clip": None, "batch_size": 4, "checkpoint_activations": True}),
    "tune-static": ((3,), {"shard": "full", "router": "static", "gates": "hard", "full_probability": 0.2}),
    "tune-adaptive": (
        (3,),
        {"router": "adaptive", "gates": "soft", "full_probability": 0.0, "distillation": 0.0},
    ),
}
# at a constant rate, so that a run can be given more steps
LONG = {
    "shard": "full",
    "distillation": 0.0,
    "warmup": 0.0,
    "min_lr_ratio": 1.0,
    "eval_every": 0,
    "checkpoint_every": 1,
}
Job = tuple[dict[str, Any] | None, Path]  # what it changes, and the folder of the run; None: `measure`


def exact(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    """The norm without transformers' float32 in between, where a row's rounding depends on its place in the batch."""
    return norm.weight * x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


@mock.patch.object(LlamaRMSNorm, "forward", exact)
def run(changes: Mapping[str, Any], directory: Path) -> None:
    """Run, or resume, and write what came of it."""
    directory.mkdir(parents=True, exist_ok=True)
    changes = dict(changes)
    if ranks.now().size == 1:
        changes.pop("shard", None)
    kind, stored = changes.pop("router", None), changes.pop("stored", False)
    shape = {name: changes.pop(name) for name in ("tie_word_embeddings",) if name in changes}
    config = (TuneConfig if kind else TrainConfig)(**asdict(CONFIG) | changes)
    model = _model(0, directory, config, stored, shape)
    options: dict[str, Any] = {"validation": windows(tiny_run.tokens(), 3, 12)}
    if config.distillation:
        options["teacher"] = _model(1, directory, config, stored, shape)
    begun = [fingerprint(m.state_dict()) for m in (model, options.get("teacher", model))]
    if kind:
        router = router_of(model, kind)
        report = tune(model, router, fraction, tiny_run.tokens(), config, directory, **options)
    else:
        report = train(model, tiny_run.tokens(), config, directory, **options)
    found: dict[str, Any] = {"losses": report.losses, "begun": begun}
    found["evaluations"] = [r["sub_networks"] for r in report.evaluations]
    (directory / f"rank-{ranks.now().rank}.json").write_text(json.dumps(found))
    weights = {name: full(p) for name, p in model.state_dict().items()}
    weights |= {f"router.{k}": v for k, v in router.state_dict().items()} if kind else {}
    if ranks.is_first():
        save_tensors(directory / "weights.safetensors", weights)


def _model(seed: int, directory: Path, config: TrainConfig, stored: bool, shape: Mapping[str, Any]) -> Any:
    """A model in float64; several processes read a stored one, each its part."""
    model = tiny_run.elastic(seed=seed, **shape).double()
    if not stored or ranks.now().size == 1:
        return model
    place = directory / f"stored-{seed}"
    other = tiny_run.elastic(seed=2, **shape).double()

    def store() -> None:
        save_elastic(model, place, shard_bytes=20_000)  # in many files
        save_elastic(other, directory / "other")

    ranks.first(store)
    if not seed:
        return _read(place, config)
    # another model, and over it the one that is stored: what becomes of a teacher in a resumed run
    model = _read(directory / "other", config)
    overwrite(dict(model.named_parameters()), sorted(place.glob("*.safetensors")))
    return model


def _read(place: Path, config: TrainConfig, dtype: str = "float64") -> Any:
    with ElasticDirectory.open(place) as checkpoint:
        cut = cut_of(checkpoint.origin.elastic, config, ranks.now().device)
        return checkpoint.model(dtype, cut=cut)


def store_large(directory: Path) -> None:
    """A model of 36 million parameters in bfloat16, for `measure`, and a small one."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "vocab_size": 8192}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    with torch.random.fork_rng(devices=[]):
        save_elastic(make_elastic(tiny_run.parent(**shape).bfloat16()), directory / "large")
    save_elastic(tiny_run.elastic(), directory / "small")


def measure(directory: Path) -> None:
    """Write how much this process's memory grew at most.

    As it read its part of a model and knew it by it, and as rank 0 wrote the whole model to the disk.
    """
    config = replace(CONFIG, shard="full")
    small = _read(directory / "small", config, "float32")
    fingerprint(small.state_dict())  # what grows only once
    first_with_weights(small, lambda weights: _write(directory / "small-again", weights))
    before = _begin_peak()
    model = _read(directory / "large", config, "float32")
    known = fingerprint(model.state_dict())
    found: dict[str, Any] = {"known": known, "grown": _memory("VmHWM") - before}
    before = _begin_peak()
    first_with_weights(model, lambda weights: _write(directory / "large-again", weights))
    found |= {"wrote": _memory("VmHWM") - before, "largest": max(p.nbytes for p in model.parameters())}
    found |= {
        "part": sum(p.to_local().nbytes for p in model.parameters()),
        "whole": sum(p.nbytes for p in model.parameters()),
        "layer": sum(p.nbytes for p in model.model.layers[0].parameters()),
    }
    (directory / f"rank-{ranks.now().rank}.json").write_text(json.dumps(found))


def _write(folder: Path, weights: Any) -> None:
    folder.mkdir()
    save_weights(folder, weights)


def _begin_peak() -> int:
    """Let the peak of memory begin again, from what is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def start(processes: Processes, size: int, jobs: Sequence[Job]) -> None:
    """Run jobs, one after the other, on ``size`` processes; an even number is two nodes'."""
    processes.load("sharded_run")
    code = "import sys, sharded_run; sharded_run.work(sys.argv[2])"
    asked = json.dumps([(changes, str(directory)) for changes, directory in jobs])
    node = size // 2 if size % 2 == 0 else size
    ended = processes.run(size, ["-c", code, asked], LOCAL_WORLD_SIZE=node)
    assert [e.rc for e in ended] == [0] * size, [e.err for e in ended]


def work(jobs: str) -> None:
    """What each process does."""
    with ranks.joined("train"):
        for changes, directory in json.loads(jobs):
            measure(Path(directory)) if changes is None else run(changes, Path(directory))
