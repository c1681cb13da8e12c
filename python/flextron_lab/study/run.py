"""Runs the study one job at a time: a job appends its rows to ``runs.jsonl`` and is never run again."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flextron import data as text
from flextron import pipeline, ui
from flextron.artefacts.directory import ElasticDirectory, load_elastic
from flextron.artefacts.elastic_model import save_elastic
from flextron.artefacts.ladder import uniform_ladder
from flextron.artefacts.latency_table import LatencyTable
from flextron.artefacts.machine import machine_on
from flextron.artefacts.noise import Noise
from flextron.artefacts.static_router import RouterResult
from flextron.checkpoint import locked, read_lines
from flextron.checkpoint.hf import read_tokenizer
from flextron.checkpoint.schema import build
from flextron.config import Widths
from flextron.corpus import Corpus
from flextron.inference import from_pretrained
from flextron.judge.latency import fractions, measure
from flextron.judge.loss import evaluate
from flextron.nn import Dial, make_elastic
from flextron.nn.protocol import Elastic
from flextron.pipeline import Progress
from flextron.recipes import RouteConfig
from flextron.training import train as train_model
from flextron_lab.demo.parents import load_parent
from flextron_lab.study import texts
from flextron_lab.study.plan import PLANS, Arm, Plan

RUNS = "runs.jsonl"
STAGES = ("prepare", "profile", "train", "route", "adaptive", "latency")
# how an adaptive router learns -> the name of its arm
ADAPTIVE = {"gumbel": "adaptive routers", "surrogate": "adaptive routers by surrogate"}
_HELD_OUT = 0.15  # share of the text that judges; all stages work on the rest
_ROUNDS = 5  # samples taken of each latency

Row = dict[str, Any]
Job = tuple[str, Callable[[], list[Row]]]


class Study:
    """One parent's study in a folder of its own.

    Args:
        parent: a key of `PLANS`.
        out: the parent's folder; jobs that are recorded there are not done again.
        seeds: seeds that every arm is run with.
        progress: called with the name of the work, the steps done and the steps in all.
    """

    def __init__(self, parent: str, out: str | Path, seeds: Sequence[int], progress: Progress) -> None:
        if parent not in PLANS:
            raise ValueError(f"reproduce: parents must be among {', '.join(PLANS)}, got {parent}")
        if not seeds:
            raise ValueError("reproduce: seeds must not be empty, got none")
        self.plan: Plan = PLANS[parent]
        self.out, self.seeds, self.progress = Path(out), tuple(seeds), progress
        self.out.mkdir(parents=True, exist_ok=True)
        self._corpus: Corpus | None = None

    def run(self, stages: Sequence[str] = STAGES, deadline: float | None = None) -> bool:
        """Do the jobs of ``stages`` that are left; stop after the job during which ``deadline`` passes.

        Args:
            stages: names from `STAGES`; they are run in the order of `STAGES`.
            deadline: a time of `time.monotonic`, in seconds; None sets no deadline.

        Returns:
            Whether all jobs are done.
        """
        with locked(self.out, "reproduce"):
            return self._run(stages, deadline)

    def _run(self, stages: Sequence[str], deadline: float | None) -> bool:
        if unknown := [stage for stage in stages if stage not in STAGES]:
            raise ValueError(f"reproduce: stages must be among {', '.join(STAGES)}, got {', '.join(unknown)}")
        for stage in STAGES:
            if stage not in stages:
                continue
            for name, job in getattr(self, f"_{stage}")():
                if name in self.done():
                    continue
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                self.progress(name, 0, 1)
                began = time.perf_counter()
                rows = job()
                self._record(name, rows, time.perf_counter() - began)
                self.progress(name, 1, 1)
        return True

    def done(self) -> dict[str, Row]:
        """The recorded jobs: name -> {"rows", "seconds"}."""
        path = self.out / RUNS
        records = read_lines(path) if path.exists() else []
        for number, record in enumerate(records, 1):
            build(str, record.get("job"), f"{path}: line {number}", "job")
            build(tuple[Row, ...], record.get("rows"), f"{path}: line {number}", "rows")
        return {record["job"]: record for record in records}

    def _record(self, job: str, rows: list[Row], seconds: float) -> None:
        line = json.dumps({"job": job, "seconds": round(seconds, 2), "rows": rows})
        with (self.out / RUNS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    # ---- the stages, each of which yields its jobs

    def _prepare(self) -> Iterator[Job]:
        yield "convert", self._convert

    def _profile(self) -> Iterator[Job]:
        yield "profile", self._measure_table

    def _train(self) -> Iterator[Job]:
        for order in ("importance", "none"):  # these arms do not depend on the seed
            yield f"untrained/{order}", lambda o=order: self._judge_untrained(o, 0)
        for seed in self.seeds:  # seed by seed, so that a study that is cut short lacks seeds, not arms
            yield f"untrained/random/{seed}", lambda s=seed: self._judge_untrained("random", s)
            for name, arm in self.plan.arms().items():
                yield f"train/{name}/{seed}", lambda n=name, a=arm, s=seed: self._train_arm(n, a, s)

    def _route(self) -> Iterator[Job]:
        for seed in self.seeds:
            yield f"route/{seed}", lambda s=seed: self._route_static(s)
            yield f"route end to end/{seed}", lambda s=seed: self._route_end_to_end(s)

    def _adaptive(self) -> Iterator[Job]:
        for seed in self.seeds:
            for form, arm in ADAPTIVE.items():
                yield f"{arm}/{seed}", lambda f=form, s=seed: self._route_adaptive(f, s)

    def _latency(self) -> Iterator[Job]:
        # The name counts the networks: when rows were added, all networks are timed again, side by side.
        adaptive = sum(job.startswith("adaptive ") for job in self.done())
        yield f"latency of {len(self._sub_networks())} and {adaptive}", self._measure_all

    # ---- the jobs

    def _convert(self) -> list[Row]:
        parent = load_parent(self.plan.parent)
        corpus = self.corpus(parent.tokenizer)
        for order in ("importance", "none", "random"):
            # The random arm is about the draw, so it has a random order for each seed.
            for seed in self.seeds if order == "random" else (0,):
                pipeline.convert(
                    parent.model,
                    self._converted(order, seed),
                    data=corpus,
                    tokenizer=parent.tokenizer,
                    force=True,  # replaces what a killed run left
                    samples=self.plan.calibration,
                    length=self.plan.length,
                    order=order,
                    seed=seed,
                    progress=self.progress,
                )
        return []

    def _measure_table(self) -> list[Row]:
        directory = self._converted("importance", 0)
        pipeline.profile(directory, [self.plan.workload], rounds=_ROUNDS, progress=self.progress)
        pipeline.profile_adaptive(directory, rounds=_ROUNDS, progress=self.progress)
        return []

    def _judge_untrained(self, order: str, seed: int) -> list[Row]:
        model, _ = load_elastic(self._converted(order, seed))
        arm = next(name for name, arm in self.plan.arms().items() if arm == Arm(order=order))
        return self._judge(model, arm, seed, 0, self.uniform())

    def _train_arm(self, name: str, arm: Arm, seed: int) -> list[Row]:
        model, _ = load_elastic(self._converted(arm.order, seed))
        corpus, rungs = self.corpus(), self.uniform()
        teacher = None
        config = self.plan.training(arm, seed, None if arm.alone is None else rungs[arm.alone])
        if config.distillation:
            teacher, _ = load_elastic(self._converted("importance", 0))
        if arm.start == "scratch":
            model = self._from_scratch(model, seed)
        with tempfile.TemporaryDirectory() as scratch:
            report = train_model(
                model,
                corpus.train,
                config,
                Path(scratch) / "run",
                teacher=teacher,
                progress=lambda step, steps, _: self.progress(f"{name}, seed {seed}", step, steps),
            )
        judged = rungs if arm.alone is None else {arm.alone: rungs[arm.alone]}
        rows = self._judge(model, name, seed, report.tokens, judged)
        if arm == Arm():
            directory = self._trained(seed)
            shutil.copytree(self._converted("importance", 0), directory, dirs_exist_ok=True)
            save_elastic(model, directory)
        return rows

    def _route_static(self, seed: int) -> list[Row]:
        result, model, cost = self._routed(self._trained(seed), replace(self.plan.route, seed=seed))
        tokens = self._trained_tokens(seed)
        searched = {t.target: t.search_widths for t in result.targets if t.target in self.plan.budgets}
        rows = self._judge(model, "static routers", seed, tokens, self._rungs(model))
        rows += self._judge(model, "searched", seed, tokens, searched)
        return [row | cost | {"surrogate": result.surrogate.to_dict()} for row in rows]

    def _route_end_to_end(self, seed: int) -> list[Row]:
        """Train static routers by the model's own loss, in a copy, so that the folder keeps the surrogate's routers."""
        config = replace(self.plan.route, seed=seed, **self.plan.end_to_end)
        with tempfile.TemporaryDirectory() as scratch:
            directory = shutil.copytree(self._trained(seed), Path(scratch) / "model")
            _, model, cost = self._routed(directory, config)
        rows = self._judge(model, "end to end", seed, self._trained_tokens(seed), self._rungs(model))
        return [row | cost for row in rows]

    def _routed(self, directory: Path, config: RouteConfig) -> tuple[RouterResult, Any, Row]:
        """Train routers; returns the result, the model with these routers, and the CPU seconds over all threads."""
        began = time.process_time()
        result = pipeline.route(
            directory,
            config,
            data=self.corpus(),
            samples=self.plan.route_samples,
            length=self.plan.length,
            progress=self.progress,
        )
        cost = {"router_seconds": round(time.process_time() - began, 1)}
        return result, from_pretrained(directory), cost

    def _rungs(self, model: Elastic) -> dict[float, Widths]:
        return {b: model.planner.resolve(b) for b in self.plan.budgets}

    def _route_adaptive(self, form: str, seed: int) -> list[Row]:
        directory = self._adaptive_folder(form, seed)
        if directory != self._trained(seed):
            shutil.copytree(self._trained(seed), directory, dirs_exist_ok=True)
        began = time.process_time()
        result = pipeline.route_adaptive(
            directory,
            replace(self.plan.adaptive, seed=seed, form=form),
            data=self.corpus(),
            length=self.plan.adaptive_length,
            progress=self.progress,
        )
        cost = {"router_seconds": round(time.process_time() - began, 1)}
        if result.surrogate is not None:
            cost |= {"surrogate": result.surrogate.to_dict(), "gate": asdict(result.gate)}
        model = from_pretrained(directory)
        tokens, table = self._judging(), self.table()
        # the adaptive router cannot be as fast as the other budgets
        budgets = [b for b in self.plan.budgets if b in result.router.targets]
        dials = [Dial.adaptive(model.elastic, [b]) for b in budgets]
        shares = fractions(model, table, tokens, budgets, "prefill").tolist()
        losses = evaluate(model, tokens, dials, batch_size=4)
        trained = self._trained_tokens(seed)
        return [
            {"arm": ADAPTIVE[form], "seed": seed, "budget": budget, "tokens": trained, "loss": loss,
             "predicted_ms": fraction * table.full_ms, **cost}
            for budget, loss, fraction in zip(budgets, losses, shares, strict=True)
        ]  # fmt: skip

    def _measure_all(self) -> list[Row]:
        """Time every sub-network that any row is about in one run, so that their milliseconds compare."""
        model, _ = load_elastic(self._converted("importance", 0))
        others = [widths for widths in self._sub_networks() if widths != model.elastic.full()]
        found = measure(
            model,
            others,
            self.plan.workload,
            rounds=_ROUNDS,
            on_round=lambda done: self.progress("measuring every sub-network", done, _ROUNDS),
        )
        self._tell(found.noise)
        timed = zip((model.elastic.full(), *others), (found.full, *found.others), strict=True)
        rows = [
            {"timed": w.to_dict(), "measured_ms": ms, "spread_ms": spread, "full_ms": found.full.ms}
            for w, (ms, spread) in timed
        ]
        done = [(f, s) for s in self.seeds for f, arm in ADAPTIVE.items() if f"{arm}/{s}" in self.done()]
        return rows + [row for form, seed in done for row in self._measure_adaptive(form, seed)]

    def _measure_adaptive(self, form: str, seed: int) -> list[Row]:
        """Time an adaptive router on real text, where the widths of the tokens, and choosing them, decide the time."""
        model = from_pretrained(self._adaptive_folder(form, seed))
        workload = self.plan.workload
        ids = text.windows(self.corpus().held_out, workload.batch, workload.length)
        budgets = [row["budget"] for row in self.done()[f"{ADAPTIVE[form]}/{seed}"]["rows"]]
        dials = [Dial.adaptive(model.elastic, [b]) for b in budgets]
        found = measure(model, dials, workload, rounds=_ROUNDS, ids=ids)
        self._tell(found.noise)
        return [
            {
                "timed_adaptive": [ADAPTIVE[form], seed, budget],
                "measured_ms": ms,
                "spread_ms": spread,
                "full_ms": found.full.ms,
            }
            for budget, (ms, spread) in zip(budgets, found.others, strict=True)
        ]

    @staticmethod
    def _tell(noise: Noise) -> None:
        if noise.sentence:
            ui.tell(noise.sentence)

    # ---- what the jobs share

    def _sub_networks(self) -> list[Widths]:
        """The sub-networks that the rows are about, each once, in order."""
        rows = [row for record in self.done().values() for row in record["rows"] if "mlp" in row]
        return list(dict.fromkeys(Widths(row["mlp"], row["heads"]) for row in rows))

    def corpus(self, tokenizer: Any = None) -> Corpus:
        """The stories, as tokens to work on and tokens to judge by."""
        if self._corpus is None:
            tokenizer = tokenizer or read_tokenizer(self._converted("importance", 0))
            parts = text.split_documents(texts.tiny_stories(), held_out=_HELD_OUT)
            self._corpus = Corpus(*(texts.story_tokens(part, tokenizer) for part in parts))
        return self._corpus

    def table(self) -> LatencyTable:
        with ElasticDirectory.open(self._converted("importance", 0)) as checkpoint:
            planner = checkpoint.planner(machine_on(torch.device("cpu"), torch.float32))
        if not planner.here:
            raise ValueError(
                "reproduce: stages must include prepare and profile before this one, got neither"
            )
        return planner.table(self.plan.workload.phase)

    def uniform(self) -> dict[float, Widths]:
        """The uniform ladder's widths for each budget, and the full model's at 1."""
        model, _ = load_elastic(self._converted("importance", 0))
        table, ladder = self.table(), uniform_ladder(model.elastic)
        found = {b: ladder.highest(table.predict, b * table.full_ms) for b in (*self.plan.budgets, 1.0)}
        if None in found.values():
            raise ValueError(
                f"reproduce: budgets must be at least {table.smallest_ms / table.full_ms:.3f}, what the fastest "
                f"network takes on this machine, got {min(found):g}"
            )
        return found

    def _judge(
        self, model: Elastic, arm: str, seed: int, tokens: int, widths: dict[float, Widths]
    ) -> list[Row]:
        table = self.table()
        losses = evaluate(model, self._judging(), list(widths.values()), batch_size=4)
        return [
            {
                "arm": arm,
                "seed": seed,
                "budget": budget,
                "tokens": tokens,
                "loss": loss,
                "predicted_ms": table.predict(w),
                "params": model.elastic.params(w),
                **w.to_dict(),
            }
            for (budget, w), loss in zip(widths.items(), losses, strict=True)
        ]

    def _judging(self) -> Tensor:
        return text.windows(self.corpus().held_out, self.plan.judged, self.plan.length)

    def _from_scratch(self, model: Elastic, seed: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = copy.deepcopy(model.config)
            fresh = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        return make_elastic(fresh.float(), model.elastic)

    def _trained_tokens(self, seed: int) -> int:
        rows = self.done()[f"train/importance order/{seed}"]["rows"]
        return max(row["tokens"] for row in rows)

    def _converted(self, order: str, seed: int) -> Path:
        return self.out / (f"converted-{order}-{seed}" if order == "random" else f"converted-{order}")

    def _trained(self, seed: int) -> Path:
        return self.out / f"trained-{seed}"

    def _adaptive_folder(self, form: str, seed: int) -> Path:
        trained = self._trained(seed)
        return trained if form == "gumbel" else trained.with_name(f"{trained.name}-{form}")
