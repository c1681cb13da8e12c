"""Elastic continued training: every micro-batch trains another sub-network of the same weights.

``sampler.py`` draws the sub-networks, ``optimizer.py`` moves the weights, ``resume.py`` has what a killed run needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flextron import ranks
from flextron.config import Widths
from flextron.data import Batches, Tokens, checksum_of, seeded
from flextron.judge.loss import restored
from flextron.judge.objectives import (
    Objective,
    TopLogits,
    imitation,
    imitation_of_top,
    next_token,
    weighted,
)
from flextron.nn.allocator import kept
from flextron.nn.forward import ElasticForward, runs_on
from flextron.nn.headless import headless, plain_head
from flextron.nn.protocol import Elastic
from flextron.nn.recomputation import recomputing
from flextron.nn.storage import name_of, storage
from flextron.nn.widened import is_narrow, widened
from flextron.recipes import TrainConfig
from flextron.training.meter import Meter
from flextron.training.metrics import MetricsLog
from flextron.training.optimizer import adamw, learning_rate, trained
from flextron.training.resume import (
    HELD,
    Checkpoints,
    fingerprint,
    load_training_tensors,
    training_tensors,
)
from flextron.training.sampler import WidthSampler, homogeneous
from flextron.training.sharding import Spread, computes_in_bf16, full, is_sharded
from flextron.training.teacher import TeacherLogits, Told

# Fields that change what a run reports, when it saves and what memory it takes, but no weight; they may differ in a
# resumed run.
_FREE_FIELDS = {"eval_every", "eval_widths", "checkpoint_every", "checkpoint_activations", "shard"}

# (step, steps, the step's line of metrics.jsonl)
Progress = Callable[[int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class TrainReport:
    """What a run did. Its ``run.json`` records the same configuration, ``metrics.jsonl`` every step.

    Attributes:
        config: as it was run.
        bf16: whether the forward passes were autocast to bfloat16.
        distilled: whether there was a teacher.
        resumed_from: step at which this call took the run up; 0 at its beginning.
        tokens: trained on in the whole run.
        seconds: duration of this call.
        losses: loss of every step of the whole run.
        evaluations: ``{"step", "sub_networks": [{"mlp", "heads", "size", "loss"}]}``, in order; one more with
            ``"stored": True`` where the last weights were rounded to be stored.
    """

    config: TrainConfig
    bf16: bool
    distilled: bool
    resumed_from: int
    tokens: int
    seconds: float
    losses: list[float]
    evaluations: list[dict[str, Any]]


def train(
    model: Elastic,
    tokens: Tokens,
    config: TrainConfig,
    directory: str | Path,
    *,
    teacher: nn.Module | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    validation: Tensor | None = None,
    begun: Callable[[], object] | None = None,
    starting: Callable[[], object] | None = None,
    cached: Told | None = None,
) -> TrainReport:
    """Train an elastic model in place, each micro-batch at another sub-network.

    A killed run that is started again with the same arguments goes on from its last checkpoint and ends with
    the very weights it would have had (same torch, machine and number of threads). Afterwards the model's
    widths and mode, and torch's global generator, are what they were before.

    A run that is started again with more ``config.steps`` goes on to them, finished or not: each new step has the
    learning rate that it has in a run of so many. The steps before had those of the shorter run, and nothing else is
    different: where the rate is constant (``warmup=0, min_lr_ratio=1``) the weights are those of one long run.

    Args:
        model: from `flextron.nn.make_elastic`, with float32 weights.
        tokens: [tokens] int64, the stream to train on; or one that lies on the disk, or a mixture of streams.
        config: how.
        directory: folder of the run's checkpoints and metrics, its own.
        teacher: frozen model to distil from; given exactly when ``config.distillation`` is above 0. An elastic one in
            bfloat16 or float16 computes in float32, a part of a layer at a time; any other computes as it is.
        resume: take up the run in ``directory``, which wants the model with the weights that the run started from
            or saved; otherwise what is there is replaced.
        progress: called after every step with (step, steps, the step's metrics).
        validation: [n, length] int64, for the evaluations; none without it.
        begun: called once ``directory`` is the folder of a run that begins, before its first step.
        starting: called before the first step of this call, where there is one.
        cached: called with (windows done, windows) while ``config.teacher_logits`` are computed, after which the
            teacher leaves the GPU.

    Raises:
        ValueError: an argument does not fit, or ``directory`` holds another run.
        CheckpointError: no checkpoint in ``directory`` is intact.
        FloatingPointError: loss or gradient became infinite or NaN; the weights are those before that step.
    """
    check_model(model)
    check_teacher(model, teacher, config)
    run = Run(model, tokens, config, Path(directory), teacher, validation)
    return run_to_the_end(run, resume, progress, begun, starting, cached)


def run_to_the_end(
    run: Run,
    resume: bool,
    progress: Progress | None,
    begun: Callable[[], object] | None,
    starting: Callable[[], object] | None,
    cached: Told | None,
) -> TrainReport:
    """Run, and leave the model's dial and mode, and torch's global generator, as they were."""
    devices = [run.device] if run.device.type == "cuda" else []
    layers = recomputing(run.model) if run.config.checkpoint_activations else nullcontext()
    memory = kept() if run.device.type == "cpu" else nullcontext()
    with restored(run.model), layers, memory, torch.random.fork_rng(devices=devices):
        try:
            report = run.to_the_end(resume, progress, begun, starting, cached)
        except BaseException:
            with suppress(Exception):  # the error of the run is the one to tell
                run.checkpoints.close()
            raise
        run.checkpoints.close()
        return report


class Run:
    """The moving parts of one call of :func:`train`; ``tuning.py`` adds a router."""

    def __init__(
        self,
        model: Elastic,
        tokens: Tokens,
        config: TrainConfig,
        directory: Path,
        teacher: nn.Module | None,
        validation: Tensor | None,
    ) -> None:
        self.model, self.config, self.teacher, self.validation = model, config, teacher, validation
        self.device = next(model.parameters()).device
        self.bf16 = computes_in_bf16(config, self.device)
        self.names = [name for name, _ in trained(model)]
        rows = ranks.rows_of("train: batch_size", range(config.batch_size))
        self.batches = Batches(tokens, config.batch_size, config.length, config.seed, rows)
        self.sampler = WidthSampler(model.elastic, config.full_probability, config.seed, config.networks)
        self.eval_widths = config.eval_widths or _default_eval_widths(model, config.networks)
        for widths in self.eval_widths:
            model.elastic.check(widths)
        self.directory = directory
        self.seen: list[tuple[float, Tensor]] = []  # size and loss of each micro-batch of the last step
        self.flops = 0.0  # of the last step
        identity, weights = self._identity(tokens), fingerprint(model.state_dict())
        ranks.agree("train", {**asdict(config), **identity, "weights": weights})
        self.top = self._top_logits(identity) if config.teacher_logits else None
        self.checkpoints = Checkpoints(directory, identity, weights, _stored(model))
        self.spread = Spread(model, teacher, config, self.bf16, self.batches.rows)
        # A GPU's loss is made of logits: there the GEMMs want more rows at once than a CPU's caches hold.
        alone = ranks.now().size == 1 and self.device.type == "cpu"
        self.head = plain_head(model) if alone else None
        self.optimizer: Any  # `found_inf` is no attribute of its class
        self.optimizer = adamw(model, config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def to_the_end(
        self,
        resume: bool,
        progress: Progress | None,
        begun: Callable[[], object] | None,
        starting: Callable[[], object] | None,
        cached: Told | None,
    ) -> TrainReport:
        began = time.perf_counter()
        steps, every = self.config.steps, self.config.checkpoint_every
        start = self._start(resume)
        log = MetricsLog(self.directory, start)
        if start:
            self.checkpoints.extend(start)  # once all that was there is known to be whole
        self.meter = Meter(self.device, self.bf16, self._smallest(), log.read())
        self.optimizer.zero_grad()  # a gradient the caller left would be taken for ours
        if starting is not None and start < steps and ranks.is_first():
            starting()
        if start == 0:
            if begun is not None and ranks.is_first():
                begun()
            self._evaluate(0, log)
        if self.top is not None and start < steps:
            self._ask_teacher(self.top, cached)
        for step in range(start + 1, steps + 1):
            record = self._step(step)
            log.write(record)
            self._evaluate(step, log)
            if every and (step % every == 0 or step == steps):
                self._save(step)
            if progress is not None:
                progress(step, steps, record)
        log.close()
        records = log.read()
        return TrainReport(
            config=self.config,
            bf16=self.bf16,
            distilled=self.teacher is not None,
            resumed_from=start,
            tokens=steps * self._tokens_per_step(),
            seconds=time.perf_counter() - began,
            losses=[r["loss"] for r in records if "loss" in r],
            evaluations=[r for r in records if "sub_networks" in r],
        )

    def _step(self, step: int) -> dict[str, Any]:
        began = time.perf_counter()
        rate = learning_rate(self.config, step)
        # a seed for each step and process, so that a checkpoint needs no state of torch's own generators
        torch.manual_seed(seeded(f"torch/{self.config.seed}/{step}/{ranks.now().rank}").initial_seed())
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)  # a multiple of the model's
        self.model.train()
        terms, size = self._accumulate()
        losses = self.spread.mean(torch.stack([*terms.values()]))
        of_widths = torch.stack([loss for _, loss in self.seen])
        if not self.config.widths_per_rank:  # else rank 0 tells of its own sub-networks
            of_widths = self.spread.mean(of_widths)
        size, flops = self.spread.mean(torch.tensor([size, self.flops], dtype=torch.float64)).tolist()
        norm = full(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        self._clip(norm)
        values = torch.cat([norm[None], losses, of_widths])
        # Where this is 1 the fused step changes nothing (as `torch.amp.GradScaler` has it), so that the device goes on
        # with the step while the host waits for the values: its one read of the device in a step.
        self.optimizer.found_inf = (~values.isfinite().all()).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        read = iter(values.tolist())
        total = next(read)
        record = {"step": step, **{name: next(read) for name in terms}}
        record |= {"learning_rate": rate, "gradient_norm": total, "size": size}
        _require_finite(record)
        seconds, tokens = time.perf_counter() - began, self._tokens_per_step()
        record |= {"tokens": step * tokens, "seconds": seconds}
        seen = [(share, next(read)) for share, _ in self.seen]
        return record | self.meter.measured(tokens, flops, seconds, seen)

    def _clip(self, norm: Tensor) -> None:
        """Clip the gradient, whose norm is given. On a CPU the optimiser's step divides by what it is too long.

        A pass over all gradients of its own waits for the memory as long as a quarter of the step does.
        """
        most, moved = self.config.clip, sum(len(group["params"]) for group in self.optimizer.param_groups)
        if most is None:
            return
        # AdamW takes a float32 number for all that it moves.
        if self.device.type == "cpu" and norm.dtype == torch.float32 and moved == len(self.parameters):
            excess = ((norm + 1e-6) / most).clamp_min(1.0)  # as `clip_grads_with_norm_` has it
            self.optimizer.grad_scale = None if excess == 1 else excess
        else:
            nn.utils.clip_grads_with_norm_(self.parameters, most, norm)

    def _accumulate(self) -> tuple[dict[str, Tensor], float]:
        """Add up the gradient of one step; the means of the loss terms and of the sub-networks' size."""
        count = self.config.accumulation
        sums: dict[str, Tensor] = {}
        size = 0.0
        self.seen, self.flops = [], 0.0
        for i in range(count):
            with self.spread.micro_batch(last=i == count - 1):
                terms, share = self._micro_batch(self._on_device(next(self.batches)))
                (terms["loss"] * self.spread.weight / count).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() / count
            size += share / count
            self.seen.append((share, terms["loss"].detach()))
            self.flops += self._flops()
        return sums, size

    def _on_device(self, batch: Tensor) -> Tensor:
        """The batch on the model's device; a copy to a GPU is enqueued, and waits for nothing."""
        if self.device.type == "cuda":
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    def _micro_batch(self, batch: Tensor) -> tuple[dict[str, Tensor], float]:
        """The loss terms of a batch at another sub-network, and its size."""
        c = self.config
        widths = self.sampler.draw_for(ranks.now().rank) if c.widths_per_rank else self.sampler.draw()
        self.model.set_widths(widths)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self._losses(batch), self._size(widths)

    def _flops(self) -> float:
        """Operations of the micro-batch that was run last, on all processes; NaN where they are not known."""
        c = self.config
        return self.model.elastic.flops(self.model.widths, c.length) * c.batch_size * c.length

    def _losses(self, batch: Tensor) -> dict[str, Tensor]:
        c = self.config
        terms: dict[str, Objective] = {}
        if c.cross_entropy:
            terms["cross_entropy"] = next_token(batch)
        if self.top is not None:
            top = TopLogits(*map(self._on_device, self.top.read(self.batches.last)))
            terms["distillation"] = imitation_of_top(top, c.temperature)
        elif self.teacher is not None:
            terms["distillation"] = imitation(self._taught(batch), c.temperature)
        with nullcontext() if self.head is None else headless(self.model, self.head):
            x = self.spread.forward(input_ids=batch, use_cache=False).logits
        loss, values = weighted(x, self.head, [(getattr(c, name), term) for name, term in terms.items()])
        return {"loss": loss, **dict(zip(terms, values, strict=True))}

    @torch.no_grad()
    def _taught(self, batch: Tensor) -> Tensor:
        """The teacher's logits. What a narrow one's shards are gathered in is wide enough already.

        In a run in bfloat16 a CPU multiplies a bfloat16 teacher's weights as they are held, by the op of all layers,
        whose stream is float32 as autocast's is.
        """
        teacher: Any = self.teacher
        if self.bf16 and _multiplies_as_held(teacher):
            with torch.autocast(self.device.type, enabled=False):
                return teacher(input_ids=batch, use_cache=False).logits
        as_held = not _is_widened(teacher) or is_sharded(teacher)
        with nullcontext() if as_held else widened(teacher):
            return teacher(input_ids=batch, use_cache=False).logits

    def _top_logits(self, identity: Mapping[str, Any]) -> TeacherLogits:
        """The teacher's logits on the disk; whoever has the same teacher, text and order has the same ones."""
        c, vocabulary = self.config, self.model.elastic.vocab_size
        if c.teacher_logits > vocabulary:
            raise ValueError(
                f"train: teacher_logits must be at most the vocabulary, {vocabulary}, got {c.teacher_logits}"
            )
        facts = {name: identity[name] for name in ("teacher", "tokens")}
        facts |= {"seed": c.seed, "temperature": c.temperature, "bf16": self.bf16}
        draws = c.steps * c.accumulation * c.batch_size
        top = TeacherLogits(self.directory, self.batches, draws, c.teacher_logits, facts)
        top.check_room()
        return top

    def _ask_teacher(self, top: TeacherLogits, cached: Told | None) -> None:
        teacher: Any = self.teacher

        def logits(windows: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                return self._taught(self._on_device(windows))

        rows = -(-self.config.batch_size // ranks.now().size)
        top.fill(logits, rows, self.config.temperature, cached)
        teacher.to("cpu")

    def _evaluate(self, step: int, log: MetricsLog) -> None:
        every = self.config.eval_every
        if self.validation is None or not every or (step % every and step != self.config.steps):
            return
        losses = self.spread.evaluated(self.validation, self.eval_widths)
        rows = [
            {**w.to_dict(), "size": self._size(w), "loss": loss}
            for w, loss in zip(self.eval_widths, losses, strict=True)
        ]
        log.write({"step": step, "sub_networks": rows})

    def _start(self, resume: bool) -> int:
        """Begin a run or resume it; returns the last step that is done."""
        saved = self.checkpoints.latest() if resume else None
        ranks.agree("train", {"the step to go on from": saved.step if saved else 0})  # before a file changes
        if saved is None:
            self.checkpoints.begin()
            return 0
        more = self.sampler.state_dict() | self._more_tensors()
        load_training_tensors(saved.place, self.model, self.optimizer, self.names, more)
        self.sampler.load_state_dict(more)
        self._load_more(more)
        self.batches.load_state_dict(saved.position)
        return saved.step

    def _save(self, step: int) -> None:
        tensors = training_tensors(self.model, self.optimizer, self.names)
        tensors |= self.sampler.state_dict() | self._more_tensors()
        self.checkpoints.save(step, tensors, self.model.state_dict(), self.batches.state_dict())

    def _more_tensors(self) -> dict[str, Tensor]:
        """What else a checkpoint holds: nothing here, a router in ``tuning.py``."""
        return {}

    def _load_more(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `_more_tensors` returned."""

    def _identity(self, tokens: Tokens) -> dict[str, Any]:
        """What must be the same for a run to be the same."""
        trajectory = asdict(self.config)
        for name in _FREE_FIELDS:
            del trajectory[name]
        teacher = None
        if self.teacher is not None:
            teacher = {
                "class": type(self.teacher).__name__,
                "parameters": _parameters(self.teacher),
                "weights": fingerprint(self.teacher.state_dict()),
            }
            if _is_widened(self.teacher):
                teacher[HELD] = name_of(next(self.teacher.parameters()).dtype)
        return {
            "config": trajectory | {"bf16": self.bf16},
            "elastic": self.model.elastic.to_dict(),
            "teacher": teacher,
            "trained": self.names,
            "tokens": checksum_of(tokens),
        }

    def _smallest(self) -> float:
        """The size of the smallest sub-network that may be drawn."""
        return self._size(self.model.elastic.smallest())

    def _size(self, widths: Widths) -> float:
        """Parameters of a sub-network as a share of the full model's."""
        elastic = self.model.elastic
        return elastic.params(widths) / elastic.params(elastic.full())

    def _tokens_per_step(self) -> int:
        return self.config.accumulation * self.config.batch_size * self.config.length


def _require_finite(record: Mapping[str, Any]) -> None:
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(record[name]):
            raise FloatingPointError(
                f"train: {name} must be finite, got {record[name]} at step {record['step']}; "
                "the weights are those before that step"
            )


def _default_eval_widths(model: Elastic, networks: tuple[Widths, ...]) -> tuple[Widths, ...]:
    if networks:
        return tuple(dict.fromkeys((*networks, model.elastic.full())))
    alike = homogeneous(model.elastic)
    return tuple(dict.fromkeys((alike[0], alike[(len(alike) - 1) // 2], alike[-1])))


def check_model(model: Elastic) -> None:
    if not hasattr(model, "elastic"):
        raise ValueError(
            f"train: model must be elastic (flextron.nn.make_elastic), got {type(model).__name__}"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("train: model must have a parameter that requires a gradient, got none")
    # AdamW's small steps vanish in the 8 bits of a bfloat16 weight.
    if half := [p.dtype for p in trained if p.dtype not in (torch.float32, torch.float64)]:
        raise ValueError(
            f"train: model must have float32 weights, got {half[0]}; bf16 is the autocast's business"
        )


def check_teacher(model: Elastic, teacher: nn.Module | None, config: TrainConfig) -> None:
    if (teacher is not None) != (config.distillation > 0):
        given = "none" if teacher is None else type(teacher).__name__
        raise ValueError(
            "train: teacher must be given exactly when distillation is above 0, "
            f"got {given} and {config.distillation}"
        )
    if teacher is None:
        return
    if teacher is model:
        raise ValueError("train: teacher must be another module than model, got model itself")
    devices = {p.device for p in teacher.parameters()} - {p.device for p in model.parameters()}
    if devices:
        raise ValueError(f"train: teacher must be on the model's device, got {devices.pop()}")
    teacher.eval().requires_grad_(False)


def _stored(model: Elastic) -> dict[str, torch.dtype]:
    """The dtype that each parameter is stored in by default, under every name that it has."""
    dtypes = storage("train", model)
    of = {id(p): dtypes[name] for name, p in model.named_parameters()}
    return {name: of[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def _is_widened(teacher: Any) -> bool:
    """Whether a teacher computes in float32 and is held in less: an elastic one. Any other computes as it is."""
    return hasattr(teacher, "elastic") and is_narrow(teacher)


def _multiplies_as_held(teacher: Any) -> bool:
    """Whether the op of all layers computes an elastic teacher, in the bfloat16 that all its weights have."""
    if not hasattr(teacher, "elastic") or not runs_on(teacher.device) or is_sharded(teacher):
        return False
    return {p.dtype for p in teacher.parameters()} == {torch.bfloat16} and ElasticForward.of(teacher).serves


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
