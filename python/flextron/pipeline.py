"""The stages, each from a directory to a directory: what the command line and the demonstration call."""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flextron import data as text
from flextron.artefacts import adaptive_router, static_router
from flextron.artefacts.adaptive_router import AdaptiveResult
from flextron.artefacts.elastic_model import load_elastic, save_elastic
from flextron.artefacts.ladder import uniform_ladder
from flextron.artefacts.latency_table import LatencyTable, Workload, load_tables, machine_of, save_tables
from flextron.artefacts.planner import Planner
from flextron.artefacts.static_router import RouterResult
from flextron.checkpoint import WEIGHTS_FILE, CheckpointError, Origin, load_tensors, locked, opened
from flextron.checkpoint.hf import read_tokenizer
from flextron.checkpoint.hub import local
from flextron.checkpoint.origin import made_for
from flextron.checkpoint.schema import checking
from flextron.config import Widths, count
from flextron.conversion import convert as convert_model
from flextron.conversion.source import room_beside, source_of
from flextron.judge.latency import fractions, measure
from flextron.judge.loss import evaluate
from flextron.nn import Dial
from flextron.nn.placement import one_device
from flextron.nn.skeleton import parameter_shapes
from flextron.nn.storage import Dtype, round_in_place, storage
from flextron.recipes import AdaptiveConfig, RouteConfig, TrainConfig, TuneConfig
from flextron.routing import adaptive as adaptive_routing
from flextron.routing import static as static_routing
from flextron.routing.adaptive import train_adaptive
from flextron.routing.learning import relaxed_loss
from flextron.routing.profile import measure_adaptive
from flextron.routing.profile import profile as profile_model
from flextron.routing.static import train_routers
from flextron.training import TrainReport, resume
from flextron.training import train as train_model
from flextron.tuning import tune as tune_model

TRAINING_FOLDER, TUNING_FOLDER = "training", "tuning"
_ROUTERS = (*static_router.FILES, *adaptive_router.FILES)
Progress = Callable[[str, int, int], Any]


def _alone(stage: Callable[..., Any]) -> Callable[..., Any]:
    """The stage as the only one that writes into its directory, from beginning to end."""

    @functools.wraps(stage)
    def run(directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        if not Path(directory).is_dir():  # where a lock would make one
            raise CheckpointError(
                f"{stage.__name__}: {directory} must be an elastic checkpoint, got no directory"
            )
        with locked(directory, stage.__name__):
            return stage(directory, *args, **kwargs)

    return run


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Corpus:
    """Token streams: one to calibrate, train and route on, and one of other documents to judge by."""

    train: Tensor
    held_out: Tensor


Data = (
    str | Path | text.Text | Corpus | None
)  # as read_documents takes it, a corpus, or Python's own documentation


def documents(data: str | Path | text.Text | None = None) -> tuple[list[str], list[str]]:
    """Read ``data``, by default the documentation that comes with Python: (to train on, to judge by)."""
    return text.split_documents(text.stdlib_documents() if data is None else text.read_documents(data))


def encode(parts: tuple[list[str], list[str]], tokenizer: Any) -> Corpus:
    """The two parts of `documents` as token streams."""
    return Corpus(*(text.encode(part, tokenizer) for part in parts))


def corpus(tokenizer: Any, data: Data = None) -> Corpus:
    """Read and encode ``data``."""
    return data if isinstance(data, Corpus) else encode(documents(data), tokenizer)


def tokenizer_of(directory: str | Path) -> Any:
    """The tokenizer stored in a model directory."""
    return read_tokenizer(directory)


def from_pretrained(
    directory: str | Path, dtype: Dtype = torch.float32, *, device_map: Any = None, **hub: Any
) -> Any:
    """Load an elastic checkpoint: a transformers causal LM whose layers are elastic, with its budget dial.

    Args:
        directory: written by `convert` (and `train`, `profile`, `route`), or the id of one on the hub.
        dtype: of the weights in memory: ``"bfloat16"``, a torch dtype, or ``"auto"``: as they are stored.
        device_map: the one device to load to, such as ``"cuda:0"``; ``"auto"``: the first GPU, else the CPU; None: the
            CPU.
        hub: ``revision``, ``cache_dir`` and ``token`` of a hub id.

    Raises:
        CheckpointError: one sentence that says what is wrong with which file.
        ValueError: of ``dtype`` or ``device_map``, in one sentence.
    """
    device = one_device("from_pretrained", device_map)
    directory = local(directory, **hub)
    with opened(directory) as files:
        model, meta = load_elastic(files, dtype)
        if device is not None:
            model.to(device)
        origin = Origin.of(meta)
        model.planner = Planner.load(files, origin)
        result = adaptive_router.load(files, origin)
    if result is not None:
        with checking(Path(directory) / adaptive_router.DESCRIPTION):
            result.router.check(model.elastic)
        model.attach_router(result.router)
        if result.costs != adaptive_router.costs_of(model.planner.tables):
            warnings.warn(
                f"{directory}: the adaptive router is calibrated for other latency tables; run "
                f"`flextron route {directory} --adaptive`",
                stacklevel=2,
            )
    for table in model.planner.tables.values():
        if changes := table.differs(machine_of(model)):
            warnings.warn(
                f"{directory}: {'; '.join(changes)}; run `flextron profile {directory}`", stacklevel=2
            )
    return model


def convert(
    parent: Any,
    directory: str | Path,
    *,
    data: Data = None,
    samples: int = 512,
    length: int = 256,
    tokenizer: Any = None,
    progress: Progress = _silent,
    force: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Make an elastic checkpoint of a stock one: score, sort, prove that the full model is unchanged.

    Args:
        parent: a loaded transformers causal LM (then with ``tokenizer``), a directory, or the id of a model on the hub.
        directory: the elastic checkpoint. Stock transformers still loads it as the full parent.
        data: text to calibrate on; by default Python's own documentation.
        samples: sequences.
        length: tokens of each.
        force: replace the model that is in ``directory``, which must be new or empty otherwise.
        options: ``unit``, ``aggregate``, ``mlp_choices``, ``head_choices``, ``order``, ``seed``, ``batch_size``,
            ``dtype``, ``strip_prefix`` of `flextron.conversion.elastify.convert`.

    Returns:
        The parity certificate, the dtypes that are stored and how importance was scored, as in ``flextron.json``.
    """
    room_beside(parent, directory, force)  # before the work, too
    with locked(directory, "convert"):
        if tokenizer is None:
            tokenizer = tokenizer_of(source_of(parent))
        return convert_model(
            parent,
            directory,
            calibration=_judging(corpus(tokenizer, data).train, samples, length),
            tokenizer=tokenizer,
            progress=lambda done, total: progress("scoring neurons and heads", done, total),
            force=force,
            **options,
        )


@_alone
def train(
    directory: str | Path,
    config: TrainConfig,
    *,
    data: Data = None,
    restart: bool = False,
    validation_windows: int = 8,
    dtype: Dtype = "auto",
    progress: Progress = _silent,
) -> TrainReport:
    """Elastic continued training of a checkpoint, in place. A killed run goes on when it is called again.

    Training computes in float32, and so does the run's own folder store it: nothing is lost when it is resumed or
    given more steps. The checkpoint is stored in ``dtype``: ``"auto"``, each tensor in the one it had there,
    ``"float32"``, ``"bfloat16"`` or ``"float16"``. What that rounds off is in the report's last evaluation.

    Latency tables stay, since no size changes; routers are dropped, since every loss does.

    The teacher of a distillation is the checkpoint as it was when the run began: right after `convert` that is the
    parent itself. The run keeps it, for more steps later (see `flextron.training.train`).
    """
    model, _ = load_elastic(directory)
    model.stored = storage("train", model, dtype)
    teacher, keep_teacher = _teacher(directory, TRAINING_FOLDER, config, restart)
    tokens = corpus(tokenizer_of(directory), data)
    validation = _judging(tokens.held_out, validation_windows, config.length)
    report = train_model(
        model,
        tokens.train,
        config,
        Path(directory) / TRAINING_FOLDER,
        teacher=teacher,
        resume=not restart,
        validation=validation,
        progress=lambda step, steps, _: progress("elastic training", step, steps),
        begun=keep_teacher,
    )
    if round_in_place("train", model, model.stored) and report.evaluations:
        report.evaluations.append(_evaluated_again(model, report, validation))
    _discard_unfit(directory, save_elastic(model, directory))
    if report.resumed_from < config.steps:
        _discard(directory, TUNING_FOLDER)  # its run began at other weights
    return report


def _evaluated_again(model: Any, report: TrainReport, validation: Tensor) -> dict[str, Any]:
    """The last evaluation of a run, of the weights as they are stored."""
    last = report.evaluations[-1]
    widths = [Widths(row["mlp"], row["heads"]) for row in last["sub_networks"]]
    losses = evaluate(model, validation, widths, report.config.batch_size)
    rows = [row | {"loss": loss} for row, loss in zip(last["sub_networks"], losses, strict=True)]
    return {"step": last["step"], "stored": True, "sub_networks": rows}


@_alone
def profile(
    directory: str | Path, workloads: Sequence[Workload], *, progress: Progress = _silent, **options: Any
) -> dict[str, LatencyTable]:
    """Measure the latency table of each workload on this machine and store them; other phases' tables stay.

    Tables of another model, or damaged ones, are replaced.
    """
    model, _ = load_elastic(directory)
    try:
        tables = load_tables(directory, model.elastic)
    except CheckpointError:
        tables = {}
    for workload in workloads:
        what = f"timing {workload.phase}"
        tables[workload.phase] = profile_model(
            model, workload, progress=lambda done, total, what=what: progress(what, done, total), **options
        )
    save_tables(tables, directory)
    return tables


@_alone
def profile_adaptive(
    directory: str | Path, *, progress: Progress = _silent, **options: Any
) -> dict[str, LatencyTable]:
    """Measure what forwards with adaptive routers take, of each phase profiled on this machine, and store it.

    Phases where it is known stay as they are. ``options`` are those of `measure_adaptive`.
    """
    return _profile_adaptive(directory, load_elastic(directory)[0], progress, **options)


def _profile_adaptive(
    directory: str | Path, model: Any, progress: Progress, **options: Any
) -> dict[str, LatencyTable]:
    tables, found = load_tables(directory, model.elastic), {}
    for phase, table in tables.items():
        if table.adaptive is None and not table.differs(machine_of(model)):
            what = f"timing routers, {phase}"
            found[phase] = measure_adaptive(
                model, table, progress=lambda done, total, what=what: progress(what, done, total), **options
            )
    if found:
        save_tables(tables | found, directory)
    return tables | found


@_alone
def route(
    directory: str | Path,
    config: RouteConfig,
    *,
    data: Data = None,
    phase: str = "prefill",
    samples: int = 4,
    length: int = 128,
    progress: Progress = _silent,
) -> RouterResult:
    """Train the routers for one phase's latency, against the loss on a few sequences, and store them."""
    model, meta = load_elastic(directory)
    tables = load_tables(directory, model.elastic)
    if phase not in tables:
        raise ValueError(
            f"route: {directory} must have a latency table of {phase}; run `flextron profile {directory}`"
        )
    # Of the training text: what the routers are judged by must not have chosen them.
    tokens = _judging(corpus(tokenizer_of(directory), data).train, samples, length, "route")
    model.requires_grad_(False)
    result = train_routers(
        model.elastic,
        tables[phase],
        lambda widths: evaluate(model, tokens, [widths], batch_size=samples)[0],
        config,
        progress,
        relaxed_loss(model, tokens) if config.form == "gumbel" else None,
    )
    result.save(directory, Origin.of(meta))
    return result


@_alone
def route_adaptive(
    directory: str | Path,
    config: AdaptiveConfig | None = None,
    *,
    data: Data = None,
    phase: str = "prefill",
    samples: int = 64,
    length: int = 128,
    progress: Progress = _silent,
) -> AdaptiveResult:
    """Train the router that chooses for every token, starting where the static routers are, and store it.

    What such routers take beside the layers is measured first where it was not yet; see `profile_adaptive`.

    Args:
        directory: of an elastic checkpoint, profiled; with routers, or the uniform ladder is where it starts.
        config: how.
        data: text; by default Python's own documentation. Of its training part.
        phase: whose latency is trained for; the budgets of every profiled phase are calibrated.
        samples: sequences to train, calibrate and judge on.
        length: tokens of each.
    """
    model, meta = load_elastic(directory)
    origin = Origin.of(meta)
    model.planner = Planner.load(directory, origin)
    model.planner.table(phase)
    tokens = _judging(corpus(tokenizer_of(directory), data).train, samples, length, "route")
    tables = _profile_adaptive(directory, model, progress, hidden=config.hidden if config else None)
    result = train_adaptive(model, tables, model.planner.ladder, tokens, config, phase, progress)
    result.save(directory, origin)
    return result


@_alone
def tune(
    directory: str | Path,
    config: TuneConfig | None = None,
    *,
    adaptive: bool = False,
    data: Data = None,
    restart: bool = False,
    validation_windows: int = 8,
    samples: int = 16,
    progress: Progress = _silent,
) -> TrainReport:
    """Train the model and one of its routers jointly, in place. A killed run goes on when it is called again.

    Both routers are stored with the new weights, all or nothing, and with what is read off them: the static one with
    its ladder, the adaptive one with a new calibration. The other one has not learnt, but is calibrated for the weights
    that have moved under it. Losses in their reports are measured again; what the surrogate said stays as `route` wrote
    it, for the surrogate itself is not kept.

    Args:
        directory: of a checkpoint with the router.
        config: how; ``distillation`` above 0 has the checkpoint as it was for its teacher.
        adaptive: tune the router that chooses for every token, not the static one.
        data: text; by default Python's own documentation.
        restart: discard an unfinished run instead of resuming it.
        validation_windows: sequences behind the evaluations in ``metrics.jsonl``.
        samples: sequences for the new calibration and reports; for the adaptive router, half for each.
    """
    config = config or TuneConfig()
    model = from_pretrained(directory)
    # as from_pretrained found them: it leaves out, and says so, what was made for other weights
    static = RouterResult.load(directory) if model.planner.ladder.origin == "router" else None
    own = AdaptiveResult.load(directory) if model.adaptive is not None else None
    found = own if adaptive else static
    if found is None:
        command = f"flextron route {directory}" + " --adaptive" * adaptive
        raise ValueError(
            f"tune: {directory} must have a router made for its weights, got none; run `{command}`"
        )
    table = model.planner.table(found.phase)
    teacher, keep_teacher = _teacher(directory, TUNING_FOLDER, config, restart)
    tokens = corpus(tokenizer_of(directory), data)
    report = tune_model(
        model,
        found.router,
        lambda p: table.expected(*p, adaptive=adaptive) / table.full_ms,
        tokens.train,
        config,
        Path(directory) / TUNING_FOLDER,
        teacher=teacher,
        resume=not restart,
        validation=_judging(tokens.held_out, validation_windows, config.length),
        progress=lambda step, steps, _: progress("joint tuning", step, steps),
        begun=keep_teacher,
    )
    round_in_place("tune", model, model.stored)  # what follows is measured on what will be stored
    windows = _judging(tokens.train, samples, config.length)
    tables, ladder, fresh = model.planner.tables, model.planner.ladder, []
    if static and static.phase in tables:
        static = static_routing.refreshed(
            static, model.elastic, tables[static.phase], lambda w: evaluate(model, windows, [w])[0]
        )
        ladder = static.ladder
        fresh.append(static)
    if own and own.phase in tables:
        fresh.append(adaptive_routing.refreshed(own, model, tables, ladder, windows, progress))

    def beside(stage: Path, origin: Origin) -> None:
        for result in fresh:
            result.write(stage, origin)

    save_elastic(model, directory, beside=beside)
    return report


def budgets(
    model: Any,
    tokens: Tensor,
    targets: Sequence[float],
    *,
    phase: str = "prefill",
    adaptive: bool = False,
    rounds: int = 5,
    batch_size: int = 4,
    progress: Progress = _silent,
) -> list[dict[str, Any]]:
    """Loss, predicted and measured latency of the full model and of each target.

    A target is met once by the routers, if there are any (``"routed"``), and once by a ladder that treats all
    layers alike (``"uniform"``); with ``adaptive`` also by the router that chooses for every token: what is
    predicted then is the mean over ``tokens``, and what is measured has the routers' own time in it.

    Args:
        model: from `from_pretrained`, profiled.
        tokens: [n, length] int64, held out.
        targets: fractions of the full model's latency.
        rounds: of measurement, full model and candidates interleaved.
    """
    planner = model.planner
    table = planner.table(phase)
    planners = {"uniform": replace(planner, ladder=uniform_ladder(model.elastic))}
    if planner.ladder.origin != "uniform":
        planners = {"routed": planner} | planners
    chosen = [("full", 1.0, model.elastic.full())]
    chosen += [(kind, t, p.resolve(t, phase=phase)) for kind, p in planners.items() for t in targets]
    predicted = [table.predict(widths) for _, _, widths in chosen]
    if adaptive:
        chosen += [("adaptive", t, Dial.adaptive(model.elastic, [t], phase)) for t in targets]
        found = fractions(model, table, tokens, targets, phase)
        predicted += (found * table.full_ms).tolist()
    full_ms, others = measure(
        model,
        [dial for _, _, dial in chosen[1:]] or [chosen[0][2]],
        table.workload,
        rounds=rounds,
        ids=_workload_tokens(tokens, table.workload),
        on_round=lambda done: progress("measuring budgets", done, rounds),
    )
    rows = []
    for (kind, target, dial), ms, expected in zip(chosen, [full_ms, *others], predicted, strict=False):
        widths = dial.bound() if isinstance(dial, Dial) else dial
        rows.append(
            {
                "kind": kind,
                "target": target,
                "loss": evaluate(model, tokens, [dial], batch_size)[0],
                "predicted_ms": expected,
                "measured_ms": ms,
                "measured_fraction": ms / full_ms,
                "params": model.elastic.params(widths),
                "mlp_widths": list(widths.mlp),
                "kv_groups": [model.elastic.kv_heads(n) for n in widths.heads],
                "query_heads": [model.elastic.query_heads(n) for n in widths.heads],
            }
        )
        progress("held-out loss of budgets", len(rows), len(chosen))
    return rows


def _workload_tokens(tokens: Tensor, workload: Workload) -> Tensor:
    """Real text in the shape of a workload: what a router that looks at tokens is timed on."""
    stream, wanted = tokens.flatten(), workload.tokens
    stream = stream.repeat(-(-wanted // len(stream)))[:wanted]
    return stream.view(workload.batch, workload.length)


def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 48) -> str:
    """Greedy continuation of a prompt at the model's present budget."""
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not encoded["input_ids"].numel():
        raise ValueError(f"generate: prompt must have at least one token, got {prompt!r}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    wanted = count("generate: max_new_tokens", max_new_tokens)
    out = model.generate(**encoded, max_new_tokens=wanted, do_sample=False, pad_token_id=pad)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def held_out_windows(tokenizer: Any, data: Data, samples: int, length: int) -> Tensor:
    """[n, length] windows of the text that no stage trains on."""
    return _judging(corpus(tokenizer, data).held_out, samples, length, "held out")


def clean(directory: str | Path, *, unfinished: bool = False, dry_run: bool = False) -> dict[str, int]:
    """Remove what only resuming needs: the checkpoints of finished runs of `train` and `tune`, and their teachers.

    A run that was cleaned can no longer be given more steps; its metrics and what it was stay.

    Args:
        directory: of an elastic checkpoint.
        unfinished: also those of runs that were stopped, which can then never be finished.
        dry_run: remove nothing.

    Returns:
        Each file that goes -> the bytes that this frees.
    """
    Origin.read(directory)
    folders = [Path(directory) / name for name in (TRAINING_FOLDER, TUNING_FOLDER)]
    with locked(directory, "clean"):
        # all are asked before one is touched
        found = [p for f in folders for p in resume.clean(f, unfinished=unfinished, dry_run=True)]
        sizes = {str(p): p.stat().st_size if p.stat().st_nlink == 1 else 0 for p in found}
        if not dry_run:
            for folder in folders:
                resume.clean(folder, unfinished=unfinished)
    return sizes


def _teacher(
    directory: str | Path, folder: str, config: TrainConfig, restart: bool
) -> tuple[Any, Callable[[], None] | None]:
    """The teacher of a run in ``folder``, if it has one, and what keeps it there when the run begins."""
    if not config.distillation:
        return None, None
    teacher, _ = load_elastic(directory)
    weights, kept = Path(directory) / WEIGHTS_FILE, Path(directory) / folder / resume.TEACHER_FILE
    if not restart and kept.is_file() and resume.has_checkpoints(kept.parent):
        tensors = load_tensors(kept, parameter_shapes(teacher))
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                parameter.copy_(tensors[name])
    return teacher.requires_grad_(False), lambda: _link(weights, kept)


def _link(source: Path, target: Path) -> None:
    """Another name for a file that is only ever replaced, never written into; a copy where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _discard_unfit(directory: str | Path, origin: Origin) -> None:
    """Drop the routers that were made for other weights than those of ``origin``, which are stored by now."""
    for module in (static_router, adaptive_router):
        try:
            found = made_for(directory, module.DESCRIPTION)
        except CheckpointError:  # damaged
            found = None
        if found != origin:
            _discard(directory, *module.FILES)


def _discard(directory: str | Path, *names: str) -> None:
    for name in names:
        path = Path(directory) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _judging(stream: Tensor, samples: int, length: int, who: str | None = None) -> Tensor:
    """[n, length] windows of a stream, as far as it reaches; ``who`` asked for so many, and is told if it does not."""
    samples, length = count("text: samples", samples), count("text: length", length)
    there = min(length, stream.numel())
    found = text.windows(stream, min(samples, stream.numel() // there), there)
    if who is not None and found.shape != (samples, length):
        warnings.warn(
            f"{who}: the text has {len(found)} sequences of {there} tokens where {samples} of {length} were asked for",
            stacklevel=3,
        )
    return found
