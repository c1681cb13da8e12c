"""The demonstration: takes a real model through every stage, to a table, pictures and a sample of text."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from flextron import pipeline
from flextron.artefacts.latency_files import by_phase
from flextron.artefacts.latency_table import Workload
from flextron.checkpoint.io import read_json, write_json
from flextron.checkpoint.lock import LOCK_FILE, locked
from flextron.checkpoint.room import names_in
from flextron.conversion.refit_in_order import in_order_fault
from flextron.corpus import documents, encode, held_out_windows
from flextron.exporting import export
from flextron.inference import from_pretrained, generate
from flextron.judge.budgets import judge_budgets
from flextron.nn.anatomy import anatomy_of
from flextron.nn.protocol import Elastic
from flextron.pipeline import Progress
from flextron.recipes import RouteConfig, TrainConfig
from flextron_lab.demo.parents import Parent, load_parent
from flextron_lab.demo.pictures import draw, draw_losses

REPORT = "report.json"
_MARK = ".flextron-demo"  # marks a folder whose contents may be replaced
_SMALL = 5_000_000  # parameters; a smaller parent is a toy and gets a toy's plan
_LARGE = 50_000_000  # parameters; stories15M's full network lost 0.2 nats at the rate that SmolLM2-135M does best at


@dataclass(frozen=True)
class Plan:
    """How much work each stage does, so that a demonstration takes minutes on two cores.

    Attributes:
        targets: fractions of the full latency that are routed, measured and reported.
        prefill, decode: workloads of the two latency tables; budgets are fractions of the prefill's latency.
        train, route: settings of the two trainings.
        calibration: number of sequences that importance is scored on.
        fitted: number of sequences that last projections are fitted to, for what the routers chose.
        narrower: how much each of these networks counts in the fit, where the full one counts 1.
        ridge: how much the fit holds on to the parent's weights; with less, a few thousand tokens of one kind make the
            full network forget other text.
        judged: number of held-out sequences that every reported loss is measured on.
        length: tokens in each of these sequences.
        route_samples: number of sequences behind the divergence of one network.
        route_length: tokens in each of those sequences.
        rounds: samples taken of each latency, at least.
        patience: seconds that each latency table may take beyond that.
    """

    targets: tuple[float, ...]
    prefill: Workload
    decode: Workload
    train: TrainConfig
    route: RouteConfig
    calibration: int
    fitted: int
    narrower: float
    ridge: float
    judged: int
    length: int
    route_samples: int
    route_length: int
    rounds: int
    patience: float


def plan_for(params: int, seed: int) -> Plan:
    """The plan for a parent of this size."""
    targets = (0.5, 0.6, 0.7, 0.8, 0.9)
    route = RouteConfig(form="steps", targets=(*targets, 1.0), evaluations=2000, seed=seed)
    if params < _SMALL:
        return Plan(
            targets=targets,
            prefill=Workload.prefill(256, batch=4),
            decode=Workload.decode(128),
            train=TrainConfig(
                steps=60,
                batch_size=8,
                length=128,
                learning_rate=1e-3,
                distillation=1.0,
                eval_every=0,
                checkpoint_every=0,
                seed=seed,
            ),
            route=route,
            calibration=32,
            fitted=64,
            narrower=0.03,
            ridge=0.1,
            judged=32,
            length=128,
            route_samples=8,
            route_length=128,
            rounds=3,
            patience=2.0,
        )
    return Plan(
        targets=targets,
        prefill=Workload.prefill(256),
        decode=Workload.decode(256),
        train=TrainConfig(
            steps=50,
            batch_size=4,
            length=128,
            learning_rate=2.5e-4 if params >= _LARGE else 1e-4,
            cross_entropy=0.0,
            distillation=1.0,
            weight_decay=0.0,
            full_probability=0.1,
            eval_every=0,
            checkpoint_every=0,
            seed=seed,
        ),
        route=route,
        calibration=12,
        fitted=24,
        narrower=0.03,
        ridge=0.1,
        judged=8,
        length=256,
        route_samples=2,
        route_length=256,
        rounds=5,
        patience=60.0,
    )


@dataclass
class _Clock:
    """The seconds that each stage takes."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)


def run(
    parent: str, out: str | Path, *, data: str | Path | None = None, seed: int = 0, progress: Progress
) -> dict[str, Any]:
    """Take a parent through every stage, and train what its routers choose; returns the contents of ``report.json``.

    Args:
        parent: ``smollm2``, ``tiny``, ``stories260k``, a model directory, or the id of a model on the hub.
        out: folder for all results; an earlier demonstration in it is replaced, any other contents are refused.
        data: text to calibrate, train and judge on; by default Python's own documentation.
        seed: seed of every random draw.
        progress: called with the name of the work, the steps done and the steps in all.
    """
    out = Path(out)
    _check_room(out)
    with locked(out, "demo"):
        return _run(parent, out, data, seed, progress)


def _run(parent: str, out: Path, data: str | Path | None, seed: int, progress: Progress) -> dict[str, Any]:
    clock = _Clock()
    began = time.perf_counter()
    with clock.stage("parent"):
        parts = documents(data)
        source = load_parent(parent, progress=progress, documents=parts[0])
        plan = plan_for(sum(p.numel() for p in source.model.parameters()), seed)
        corpus = encode(parts, source.tokenizer)
    _clear(out)
    elastic = out / "elastic"
    with clock.stage("convert"):
        stored = pipeline.convert(
            source.model,
            elastic,
            data=corpus,
            tokenizer=source.tokenizer,
            samples=plan.calibration,
            length=plan.length,
            seed=seed,
            progress=progress,
        )
    description = _forget_weights(source)
    with clock.stage("profile"):
        tables = pipeline.profile(
            elastic,
            [plan.prefill, plan.decode],
            rounds=plan.rounds,
            patience=plan.patience,
            seed=seed,
            progress=progress,
        )
    with clock.stage("route"):
        routed = pipeline.route(
            elastic,
            plan.route,
            data=corpus,
            samples=plan.route_samples,
            length=plan.route_length,
            progress=progress,
        )
    if not in_order_fault(anatomy_of(source.model.config)):
        with clock.stage("refit"):
            pipeline.refit(
                elastic,
                data=corpus,
                samples=plan.fitted,
                length=plan.length,
                narrower=plan.narrower,
                ridge=plan.ridge,
                ladder=True,
                validation_windows=2,
                progress=progress,
            )
    with clock.stage("train"):
        trained = pipeline.train(elastic, plan.train, data=corpus, ladder=True, progress=progress)
        shutil.rmtree(elastic / pipeline.TRAINING_FOLDER)  # its losses are in the report
    with clock.stage("evaluate"):
        model = from_pretrained(elastic)
        table = by_phase(tables)["prefill"]
        tokens = held_out_windows(source.tokenizer, corpus, plan.judged, plan.length)
        fastest = table.smallest_ms / table.full_ms
        targets = [t for t in plan.targets if t >= fastest]
        rows = judge_budgets(model, tokens, targets, rounds=plan.rounds, progress=progress)
    with clock.stage("export"):
        widths = model.planner.resolve(targets[0])
        exported = export(model, out / "extracted", widths, tokenizer=source.tokenizer)
    with clock.stage("generate"):
        _write_sample(model, source.tokenizer, out / "sample.txt", (1.0, targets[-1], targets[0]))

    report = {
        "parent": description,
        "notes": source.notes,
        "workload": f"{table.workload.phase}, {table.workload.tokens} tokens",
        "parity": stored["parity"],
        "training": {
            "config": _plain(asdict(plan.train)),
            "tokens": trained.tokens,
            "losses": trained.losses,
        },
        "table": _residual(table),
        "decode_table": _residual(by_phase(tables)["decode"]),
        "surrogate": routed.surrogate.to_dict(),
        "gate": asdict(routed.gate),
        "routing": [asdict(t) for t in routed.targets],
        "dropped_targets": list(routed.dropped_targets),
        "budgets": rows,
        "full_mlp": model.elastic.intermediate_size,
        "full_heads": model.elastic.num_heads,
        "extracted": exported,
        "machine": table.machine | {"platform": platform.platform(), "cores": torch.get_num_threads()},
        "versions": read_json(elastic / "flextron.json")["versions"] | {"python": platform.python_version()},
        "seed": seed,
        "seconds": clock.seconds | {"total": round(time.perf_counter() - began, 2)},
    }
    write_json(out / REPORT, report)
    draw(report, out / "report.png")
    draw_losses(report, out / "losses.png")
    return report


def _check_room(out: Path) -> None:
    """Raise unless the folder is new, empty or an earlier demonstration."""
    if (out / _MARK).is_file():
        return
    if out.is_file() or names_in(out):
        raise ValueError(f"demo: out must be new, empty or an earlier demonstration, got {out}")


def _clear(out: Path) -> None:
    """Remove an earlier demonstration."""
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:  # ours
            path.unlink()
    (out / _MARK).touch()


def _forget_weights(parent: Parent) -> str:
    """Free the parent's memory, since every later stage reads the checkpoint; returns the description."""
    parent.model.to("meta")
    return parent.description


def _residual(table: Any) -> dict[str, Any]:
    return {
        "residual_median": table.residual_median,
        "residual_worst": table.residual_worst,
        "full_ms": table.full_ms,
        "smallest_fraction": table.smallest_ms / table.full_ms,
        "warnings": list(table.warnings),
        "noise": table.noise.to_dict(),
        "doubt": table.doubt,
    }


def _write_sample(model: Elastic, tokenizer: Any, path: Path, budgets: tuple[float, ...]) -> None:
    """Write one prompt's continuation at each budget."""
    prompt = "The purpose of a function is to"
    parts = []
    for budget in budgets:
        with model.budget(budget) as widths:
            said = generate(model, tokenizer, prompt)
        parts.append(
            f"--- budget {budget:g}: {model.elastic.params(widths) / 1e6:.2f} M parameters\n{said}\n"
        )
    path.write_text("\n".join(parts), encoding="utf-8")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
