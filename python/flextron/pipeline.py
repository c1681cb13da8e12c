"""The stages, each from a directory to a directory: what the command line and the demonstration call."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flextron import own_text, ranks
from flextron.artefacts import adaptive_router, static_router
from flextron.artefacts.adaptive_router import AdaptiveResult
from flextron.artefacts.directory import ElasticDirectory
from flextron.artefacts.elastic_model import Cut, save_elastic
from flextron.artefacts.latency_files import Tables, by_phase, of_machine, save_tables
from flextron.artefacts.latency_table import LatencyTable, Workload
from flextron.artefacts.machine import machine_of
from flextron.artefacts.planner import Planner, planner_of
from flextron.artefacts.static_router import RouterResult, trained_on
from flextron.checkpoint import CheckpointError, Origin, locked, stored_dtypes
from flextron.checkpoint.hf import read_tokenizer
from flextron.checkpoint.io import Pending, read_lines
from flextron.checkpoint.origin import weights_of
from flextron.checkpoint.weights import overwrite, weight_files
from flextron.config import MENUS, ElasticConfig, Widths
from flextron.conversion import convert as convert_model
from flextron.conversion.gguf import elastic_in, is_gguf, read_gguf
from flextron.conversion.refit import NARROWER, RIDGE, check_shares
from flextron.conversion.refit import refit as fit
from flextron.conversion.refit_in_order import refit_in_order
from flextron.conversion.source import room_beside, source_of
from flextron.corpus import Corpus, Data, corpus, windows
from flextron.data import Tokens
from flextron.judge.loss import divergence, evaluate, restored
from flextron.nn.packed import pack
from flextron.nn.placement import Device, current, one_device
from flextron.nn.policy import Dial
from flextron.nn.protocol import Elastic
from flextron.nn.storage import Dtype, round_in_place, storage
from flextron.recipes import AdaptiveConfig, RouteConfig, TrainConfig, TuneConfig
from flextron.routing import adaptive as adaptive_routing
from flextron.routing import static as static_routing
from flextron.routing.adaptive import train_adaptive
from flextron.routing.learning import relaxed_loss
from flextron.routing.profile import measure_adaptive
from flextron.routing.profile import profile as profile_model
from flextron.routing.static import train_routers
from flextron.sampling import sample_documents
from flextron.training import TrainReport, bf16_is_fast, resume
from flextron.training import train as train_model
from flextron.training.room import Room, room
from flextron.training.sharding import computes_in_bf16, cut_of, first_with_weights
from flextron.tuning import tune as tune_model

TRAINING_FOLDER, TUNING_FOLDER = "training", "tuning"
REFIT_FOLDER = "refit"  # the weights before a fit
_DOCUMENT = 512  # tokens that the parent writes in a row at most, where a stage asks it to
_GLIMPSE = 64  # tokens of each document by which a stage sees what its text makes the model forget
_WRITES = "the parent writes text, tokens"
_FORGOTTEN = 0.05  # nats a token; a fit of SmolLM2 on textbooks forgot 0.03, on Python's documentation 0.06
ROUTE_SAMPLES, ROUTE_LENGTH = 4, 128  # sequences behind one loss of static routers, and tokens in each
_ROUTERS = (static_router, adaptive_router)
Progress = Callable[[str, int, int], Any]
Measured = Callable[[Mapping[str, Any]], Any]  # called with a step's line of metrics.jsonl
Planned = Callable[[Room], Any]


def _alone(stage: Callable[..., Any]) -> Callable[..., Any]:
    """Let a stage hold its directory's lock from beginning to end: rank 0, which writes for all.

    Its ``device`` is checked before, once for all.
    """

    @functools.wraps(stage)
    def run(directory: str | Path, *args: Any, device: Device = "auto", **kwargs: Any) -> Any:
        chosen = one_device(stage.__name__, device)
        if not Path(directory).is_dir():  # where a lock would make one
            raise CheckpointError(
                f"{stage.__name__}: {directory} must be an elastic checkpoint, got no directory"
            )
        with _one_writer(directory, stage.__name__), current(chosen):
            return stage(directory, *args, device=chosen, **kwargs)

    return run


@contextlib.contextmanager
def _one_writer(directory: str | Path, who: str) -> Iterator[None]:
    """Hold a directory's lock for all processes: rank 0 does, which writes for all."""
    with contextlib.ExitStack() as held:
        ranks.first(lambda: held.enter_context(locked(directory, who)))
        yield


def _silent(what: str, done: int, total: int) -> None:
    """The progress callback of a call that gave none."""


def _unseen(record: Mapping[str, Any]) -> None:
    """The same of measurements."""


def _unplanned(room: Room) -> None:
    """The same of the memory that a step takes."""


def _warned(doubt: str) -> None:
    warnings.warn(doubt, stacklevel=5)


def _told(what: str, progress: Progress, measured: Measured) -> Callable[[int, int, dict[str, Any]], None]:
    """The callback of a training loop: what a step measured, then how far the run is."""

    def tell(step: int, steps: int, record: dict[str, Any]) -> None:
        measured(record)
        progress(what, step, steps)

    return tell


def convert(
    parent: PreTrainedModel | str | Path,
    directory: str | Path,
    *,
    data: Data = None,
    samples: int = 512,
    length: int = 256,
    tokenizer: PreTrainedTokenizerBase | None = None,
    planned: Callable[[Any], Any] | None = None,
    progress: Progress = _silent,
    force: bool = False,
    device: Device = "auto",
    like: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Make an elastic checkpoint of a stock one: score, sort, prove that the full model is unchanged.

    Args:
        parent: a loaded transformers causal LM (then with ``tokenizer``), a directory, the id of a model on the hub, or
            a GGUF file, of which transformers makes float32 weights. One that `flextron.export_gguf` wrote of a full
            network is elastic already: its menus, its order and its ladder stay.
        directory: the elastic checkpoint. Stock transformers still loads it as the full parent.
        data: text to calibrate on; by default Python's own documentation.
        samples: sequences to calibrate on.
        length: tokens in a sequence.
        planned: called, before any weight is read, with the memory that the conversion takes, which says itself by str.
        force: replace the model that is in ``directory``, which must be new or empty otherwise.
        device: where to score and to prove: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; ``"auto"``: that of a loaded
            parent, the first GPU, or else the CPU. Every stage takes it.
        like: a family of the table, where the parent's is not in it and is built alike.
        options: ``unit``, ``aggregate``, ``mlp_choices``, ``head_choices``, ``order``, ``seed``, ``batch_size``,
            ``dtype``, ``strip_prefix``, ``adapter`` of `flextron.conversion.elastify.convert`.

    Returns:
        The parity certificate, the dtypes that are stored and how importance was scored, as in ``flextron.json``.
    """
    if device == "auto" and isinstance(parent, PreTrainedModel):
        chosen = torch.device(parent.device)
    else:
        chosen = one_device("convert", device)
    ranks.first(lambda: room_beside(parent, directory, force))  # before the work, too
    with _one_writer(directory, "convert"), current(chosen):
        if used_up := is_gguf(parent):
            path = cast(Any, parent)
            parent, own = read_gguf(path, like)
            tokenizer = tokenizer or own
            options |= _kept(path, options)
        if tokenizer is None:
            tokenizer = read_tokenizer(source_of(parent, like))
        return convert_model(
            parent,
            directory,
            calibration=windows(corpus(tokenizer, data).train, samples, length),
            tokenizer=tokenizer,
            planned=planned,
            progress=lambda done, total: progress("scoring neurons and heads", done, total),
            force=force,
            device=chosen,
            like=like,
            used_up=used_up,
            **options,
        )


def _kept(path: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a conversion that keep what is elastic in a GGUF file already; none where nothing is."""
    found = elastic_in(path)
    if found is None:
        return {}
    config, ladder = found
    own = {"unit": config.unit, "mlp_choices": config.mlp_choices, "head_choices": config.head_choices}
    menus = [name for name in MENUS if options.get(name) not in (None, own[name])]
    if menus or options.get("order") == "random":
        raise ValueError(
            f"convert: {(menus or ['order'])[0]} must be the file's own where it is elastic already, got another"
        )
    return {**own, "order": "none", "ladder": ladder}


def sample(
    directory: str | Path,
    file: str | Path,
    *,
    tokens: int,
    dtype: Dtype | None = None,
    device: Device = "auto",
    progress: Progress = _silent,
    **options: Any,
) -> dict[str, Any]:
    """Let the full network write text to train on, into a file of JSON lines that every stage takes as its data.

    Where `refit` keeps the parent's weights, the parent writes; so it does right after `convert`.

    Args:
        directory: an elastic checkpoint.
        file, tokens: see `flextron.sampling.sample_documents`.
        dtype, device: as `flextron.from_pretrained` takes them.
        options: ``length``, ``batch_size``, ``temperature``, ``seed``, ``restart`` of `sample_documents`.
    """
    with ElasticDirectory.open(directory) as checkpoint:
        checkpoint.check_length("sample", options.get("length", 2))
        model, weights = _writer(checkpoint, dtype, one_device("sample", device))
    return sample_documents(
        model,
        read_tokenizer(directory),
        file,
        tokens=tokens,
        facts={"weights": weights},
        progress=partial(progress, "writing documents, tokens"),
        **options,
    )


def _writer(checkpoint: ElasticDirectory, dtype: Dtype | None, device: torch.device) -> tuple[Elastic, str]:
    """The parent, as far as its weights are there, ready to write, and the fingerprint of its weights."""
    model = checkpoint.model(dtype, device)
    if parent := _parent(checkpoint):
        overwrite(dict(model.named_parameters()), parent)
    weights = resume.fingerprint(model.state_dict())
    if model.device.type == "cpu" and not model.anatomy.experts:
        pack(model)
    return model, weights


def _text(
    directory: str | Path,
    data: Data,
    tokens: int,
    device: torch.device,
    progress: Progress,
    goes_on: bool = False,
) -> Corpus:
    """The text of a stage that changes weights by so many tokens: by default what the parent writes.

    That stays in the directory. A run that ``goes_on`` takes it as it is.
    """
    file = Path(directory) / own_text.FILE

    def write(count: int) -> Path:
        ranks.first(lambda: _write(directory, file, count, device, progress))
        return file

    return corpus(
        read_tokenizer(directory), own_text.written(data, 1 if goes_on else own_text.enough(tokens), write)
    )


@dataclass(frozen=True)
class _Known:
    """Some text of the parent's own, and what the full network loses on it before a stage.

    Where it then loses more on this than on the stage's held-out text, that was narrower than what it knows.
    """

    own: Tensor
    before: float

    @classmethod
    def of(cls, directory: str | Path, data: Data, model: Elastic, progress: Progress) -> _Known | None:
        """None where the parent's own text is trained on, or tokens that someone else has chosen already."""
        if isinstance(data, Corpus) or own_text.is_asked(data) or ranks.now().size > 1:
            return None
        file, tokenizer = Path(directory) / own_text.FILE, read_tokenizer(directory)
        with tempfile.TemporaryDirectory() as folder, restored(model):
            if not file.exists():
                file = Path(folder) / own_text.FILE
                told, length = partial(progress, _WRITES), _within(model, _GLIMPSE)
                model.eval().turn(Dial.of(model.elastic.full()))
                try:
                    sample_documents(
                        model, tokenizer, file, tokens=16 * _GLIMPSE, length=length, progress=told
                    )
                except ValueError:  # a parent that ends at once, or has no token between documents
                    return None
            own = windows(corpus(tokenizer, file).train, 16, _GLIMPSE)
        return cls(own, _full_loss(model, own))

    def warn(self, who: str, model: Elastic, held_out: float) -> None:
        """Say so where the model has forgotten; ``held_out``: what it loses more on the stage's held-out text."""
        own = _full_loss(model, self.own) - self.before
        if own - held_out > _FORGOTTEN:
            warnings.warn(
                f"{who}: on text that the parent writes itself the full network loses {own:+.2f} nats a token, on this "
                f"text {held_out:+.2f}: it is narrower than what the model knew; a mixture with --data "
                f"{own_text.PARENT}{own_text.MOST} forgets less",
                stacklevel=4,
            )


def _full_loss(model: Elastic, tokens: Tensor) -> float:
    return evaluate(model, tokens, [model.elastic.full()])[0]


def _write(
    directory: str | Path,
    file: Path,
    count: int,
    device: torch.device,
    progress: Progress,
) -> None:
    lines = read_lines(file) if file.exists() else []
    there = sum(line["tokens"] for line in lines)
    if there >= count:
        return
    with ElasticDirectory.open(directory) as checkpoint:
        model, weights = _writer(checkpoint, None, device)
    if lines and lines[0]["weights"] != weights:
        return warnings.warn(
            f"text: {file} has {there} tokens where {count} were asked for, and the weights that wrote it are gone: "
            "no more are written",
            stacklevel=6,
        )
    sample_documents(
        model,
        read_tokenizer(directory),
        file,
        tokens=count,
        length=_within(model, _DOCUMENT),
        facts={"weights": weights},
        progress=partial(progress, _WRITES),
    )


def _within(model: Elastic, length: int) -> int:
    """So many tokens as a document may have: ``length``, where the model knows so many positions."""
    return min(length, getattr(model.config, "max_position_embeddings", None) or length)


@_alone
def refit(
    directory: str | Path,
    *,
    data: Data = None,
    samples: int = 96,
    length: int = 256,
    narrower: float = NARROWER,
    ridge: float = RIDGE,
    ladder: bool = False,
    validation_windows: int = 8,
    dtype: Dtype = "auto",
    device: Any = "auto",
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Fit the last projection of every MLP and attention anew for all widths at once, in place; no gradient is needed.

    Narrow networks become better, and the full one a little worse than the parent: how much is in what is returned. The
    certificate of `convert` goes on being about the weights before. Those stay as the teacher of the `train` that comes
    next, until it ends. Latency tables stay; routers go, since every loss changes, but with ``ladder`` the static ones
    stay.

    Args:
        directory: an elastic checkpoint, best right after `convert`.
        data: text, `flextron.corpus.Data`; by default what the parent writes, which stays in the directory. Text that
            is unlike what the model will read fits it to that.
        samples, length: sequences of the training text, and tokens in each; an eighth judges the fit.
        narrower, ridge: of `flextron.conversion.refit.refit`.
        ladder: fit for what the static routers choose at their targets, layer after layer: see
            `flextron.conversion.refit_in_order`. Other networks get worse than by a fit for all widths.
        validation_windows: sequences of held-out text behind the losses that are returned.
        dtype, device: as `train` takes them.

    Returns:
        ``tokens`` fitted on, ``errors`` of each axis' widths and projections ``kept`` as they were, as
        `flextron.conversion.refit.Refit` has them; ``losses``: for each uniform network its ``mlp`` and ``heads``, with
        ``ladder`` for each target its ``target``, the loss ``before`` and ``after``, in nats. ``flextron.json`` keeps
        it as ``refit``.
    """
    check_shares(narrower, ridge)
    with ElasticDirectory.open(directory) as checkpoint:
        checkpoint.check_length("refit", length)
        routed = _Routed.of("refit", checkpoint) if ladder else None
        model = checkpoint.model(device=device)
        parent = _parent(checkpoint)
        weights = weight_files(checkpoint.meta["checksums"])
    if parent:
        overwrite(dict(model.named_parameters()), parent)
    model.stored = storage("refit", model, dtype)
    tokens = _text(directory, data, samples * length, device, progress)
    calibration = windows(tokens.train, samples, length, "refit")
    held_out = windows(tokens.held_out, validation_windows, length)
    named: list[dict[str, Any]]
    if routed:
        networks = [*routed.networks, model.elastic.full()]
        named = [{"target": target} for target in routed.static.router.targets]
    else:
        networks = _of_each_axis(model.elastic)
        named = [{"mlp": widths.mlp[0], "heads": widths.heads[0]} for widths in networks]
    known = _Known.of(directory, data, model, progress)
    before = evaluate(model, held_out, networks)
    told = partial(progress, "fitting the last projections")
    options: dict[str, Any] = {"narrower": narrower, "ridge": ridge, "progress": told}
    fitted = partial(refit_in_order, networks=routed.networks) if routed else fit
    found = fitted(model, calibration, **options)
    round_in_place("refit", model, model.stored)
    after = evaluate(model, held_out, networks)
    if known:
        full = networks.index(model.elastic.full())
        known.warn("refit", model, after[full] - before[full])
    losses = [name | {"before": b, "after": a} for name, b, a in zip(named, before, after, strict=True)]
    report = {**found.to_dict(), "losses": losses}
    fresh = routed.again(model, tokens.train, length) if routed else None
    if not parent:
        _discard(directory, REFIT_FOLDER)
        _keep_weights(Path(directory), weights, Path(directory) / REFIT_FOLDER)
    save_elastic(
        model,
        directory,
        prove=lambda _, __, own: {"refit": {**report, "weights": own}},
        beside=fresh.write if fresh else None,
    )
    stays = (static_router,) if fresh else ()
    _discard(
        directory,
        *(name for module in _ROUTERS if module not in stays for name in module.FILES),
        TUNING_FOLDER,
    )
    return report


@dataclass(frozen=True)
class _Routed:
    """The static routers of a checkpoint, the table that they were trained on, and what they choose there.

    Attributes:
        networks: the ladder's network at each trained target below 1.
    """

    static: RouterResult
    table: LatencyTable
    networks: tuple[Widths, ...]

    @classmethod
    def of(cls, who: str, checkpoint: ElasticDirectory) -> _Routed:
        static = checkpoint.static()
        table = static and trained_on(checkpoint.tables, static.phase, static.costs)
        if not static or not table:
            what = (
                "router made for its weights"
                if not static
                else "latency table that its router was trained on"
            )
            raise ValueError(
                f"{who}: {checkpoint.path} must have the {what}, for its ladder, got none; "
                f"run `flextron route {checkpoint.path}`"
            )
        limits = [target * table.full_ms for target in static.router.targets[:-1]]
        return cls(static, table, tuple(static.ladder.within(table.predict, limit) for limit in limits))

    def again(self, model: Elastic, text: Tokens, length: int) -> RouterResult:
        """The routers with the losses that the weights have now, on as much text as `route` takes by default.

        ``length``: of a sequence, at most.
        """
        judged = windows(text, ROUTE_SAMPLES, min(ROUTE_LENGTH, length))
        judge = _judge(model, judged, self.static.config.form)
        return static_routing.refreshed(self.static, model.elastic, self.table, judge)


def _judge(model: Elastic, tokens: Tensor, form: str) -> Callable[[Widths], float]:
    """What static routers of this form are judged by: a function of a network, in nats above the full one's value."""
    if form == "gumbel":  # which learns from the loss itself
        return lambda widths: evaluate(model, tokens, [widths])[0]
    return divergence(model, tokens)


def _of_each_axis(config: ElasticConfig) -> list[Widths]:
    """The full network, and those that are narrower along one axis, or along both at once."""
    whole = [-1] * len(config.menus)
    found = [config.full()]
    for axis, menu in enumerate(config.menus):
        found += [
            config.uniform(*(*whole[:axis], i, *whole[axis + 1 :])) for i in reversed(range(len(menu) - 1))
        ]
    return [*dict.fromkeys([*found, config.narrowest()])]


def _parent(checkpoint: ElasticDirectory) -> list[Path]:
    """The files of the weights before a fit; none where those here are not that fit's."""
    fitted = checkpoint.meta.get("refit", {}).get("weights")
    is_here = fitted == weights_of(checkpoint.meta["checksums"])
    return sorted((checkpoint.path / REFIT_FOLDER).glob(resume.TEACHER_FILES)) if is_here else []


@_alone
def train(
    directory: str | Path,
    config: TrainConfig,
    *,
    data: Data = None,
    ladder: bool = False,
    restart: bool = False,
    validation_windows: int = 8,
    dtype: Dtype = "auto",
    device: Any = "auto",
    planned: Planned = _unplanned,
    progress: Progress = _silent,
    measured: Measured = _unseen,
) -> TrainReport:
    """Elastic continued training of a checkpoint, in place. A killed run goes on when it is called again.

    Training computes in float32, and so does the run's own folder store it: nothing is lost when it is resumed or
    given more steps. The checkpoint is stored in ``dtype``: ``"auto"``, each tensor in the one it had there,
    ``"float32"``, ``"bfloat16"`` or ``"float16"``. What that rounds off is in the report's last evaluation.
    ``device`` is what `convert` takes. Without ``data`` the parent writes the text, which stays in the directory.

    Latency tables stay, since no size changes; routers are dropped, since every loss does. With ``ladder`` the networks
    that the static routers choose at their targets are trained, in place of ``config.networks``, and the routers stay.

    The teacher of a distillation is the checkpoint as it was when the run began: right after `convert` that is the
    parent itself, and after `refit` it is what that began with. The run keeps it, for more steps later (see
    `flextron.training.train`). It is held in bfloat16 or float16 where all its weights are stored so, and computes in
    float32 as the model does; on a CPU, a run in bfloat16 holds it in bfloat16, and multiplies it so.

    What cannot fit on the device is refused before anything is loaded; ``planned`` is called with what a step takes of
    its memory, before the first one.

    Before each call of ``progress``, ``measured`` is called with the step's line of ``metrics.jsonl``.
    """
    with ElasticDirectory.open(directory) as checkpoint:
        checkpoint.check_length("train", config.length)
        if routed := _Routed.of("train", checkpoint) if ladder else None:
            config = replace(config, networks=routed.networks)
        held = _teacher_dtype(checkpoint, TRAINING_FOLDER, config, restart, device)
        memory = room("train", checkpoint.origin.elastic, config, device, held.itemsize)
        cut = cut_of(checkpoint.origin.elastic, config, device, held.itemsize)
        model = checkpoint.model(device=device, cut=cut)
        teacher, keep_teacher = _teacher(checkpoint, TRAINING_FOLDER, config, restart, held, device, cut)
        routers_of = {module: checkpoint.made_for(module.DESCRIPTION) for module in _ROUTERS}
    if routed:
        del routers_of[static_router]
    model.stored = storage("train", model, dtype)
    goes_on = not restart and (Path(directory) / TRAINING_FOLDER).is_dir()
    tokens = _text(directory, data, _tokens_in(config), device, progress, goes_on)
    validation = windows(tokens.held_out, validation_windows, config.length)
    known = None if goes_on else _Known.of(directory, data, model, progress)
    before = _full_loss(model, validation) if known else 0.0
    report = train_model(
        model,
        tokens.train,
        config,
        Path(directory) / TRAINING_FOLDER,
        teacher=teacher,
        resume=not restart,
        validation=validation,
        progress=_told("elastic training", progress, measured),
        begun=keep_teacher,
        starting=partial(planned, memory),
        cached=partial(progress, "the teacher's logits"),
    )
    if round_in_place("train", model, model.stored) and report.evaluations:
        report.evaluations.append(_evaluated_again(model, report, validation))
    if known:
        known.warn("train", model, _full_loss(model, validation) - before)
    fresh = routed.again(model, tokens.train, config.length) if routed else None
    moved = report.resumed_from < config.steps
    first_with_weights(model, lambda w: _keep_trained(model, w, directory, routers_of, fresh, moved))
    return report


def _keep_trained(
    model: Elastic,
    weights: Mapping[str, Pending] | None,
    directory: str | Path,
    routers_of: Mapping[Any, Origin | None],
    fresh: RouterResult | None,
    moved: bool,
) -> None:
    """Store a trained model, and routers that stay; what was made for the weights that it had goes."""
    origin = save_elastic(model, directory, tensors=weights, beside=fresh.write if fresh else None)
    for module, made_for in routers_of.items():
        if made_for != origin:
            _discard(directory, *module.FILES)
    if moved:
        _discard(directory, TUNING_FOLDER, REFIT_FOLDER)  # about other weights


def _evaluated_again(model: Elastic, report: TrainReport, validation: Tensor) -> dict[str, Any]:
    """The last evaluation of a run, repeated on the weights as they are stored."""
    last = report.evaluations[-1]
    widths = [Widths(row["mlp"], row["heads"]) for row in last["sub_networks"]]
    losses = evaluate(model, validation, widths, report.config.batch_size)
    rows = [row | {"loss": loss} for row, loss in zip(last["sub_networks"], losses, strict=True)]
    return {"step": last["step"], "stored": True, "sub_networks": rows}


@_alone
def profile(
    directory: str | Path,
    workloads: Sequence[Workload],
    *,
    dtype: Dtype | None = None,
    device: Any = "auto",
    progress: Progress = _silent,
    **options: Any,
) -> Tables:
    """Measure the latency table of each workload on this machine and store them; returns all tables of this machine.

    Its tables of other workloads stay, and so do other machines'; what is damaged or of another model is replaced.
    ``dtype`` is what the weights have in memory, as `flextron.from_pretrained` takes it.
    """
    with ElasticDirectory.open(directory) as checkpoint:
        model = checkpoint.model(dtype, device)
        tables = checkpoint.kept_tables(machine_of(model))
    for workload in workloads:
        what = f"timing {workload}"
        tables += (profile_model(model, workload, progress=partial(progress, what), **options),)
    save_tables(tables, directory)
    return of_machine(tables, machine_of(model))


@_alone
def profile_adaptive(
    directory: str | Path,
    *,
    dtype: Dtype | None = None,
    device: Any = "auto",
    progress: Progress = _silent,
    **options: Any,
) -> dict[str, LatencyTable]:
    """Measure the time of forwards with an adaptive router, for each phase profiled on this machine, and store it.

    Returns the table that adaptive budgets of each phase mean: that of the smallest workload. Where it is known it
    stays as it is. ``options`` are those of `measure_adaptive`.
    """
    with ElasticDirectory.open(directory) as checkpoint:
        model, tables = checkpoint.model(dtype, device), checkpoint.tables
    return _profile_adaptive(directory, model, tables, progress, **options)


def _profile_adaptive(
    directory: str | Path, model: Elastic, tables: Tables, progress: Progress, **options: Any
) -> dict[str, LatencyTable]:
    own = of_machine(tables, machine_of(model))
    timed = [t for t in by_phase(own).values() if t.adaptive is None and not t.differs(machine_of(model))]

    def time_them() -> None:
        found = []
        for table in timed:
            what = f"timing routers, {table.workload.phase}"
            found.append(measure_adaptive(model, table, progress=partial(progress, what), **options))
        save_tables((*own, *found), directory)

    if timed:
        ranks.first(time_them)
        with ElasticDirectory.open(directory) as checkpoint:
            own = of_machine(checkpoint.tables, machine_of(model))
    return by_phase(own)


@_alone
def route(
    directory: str | Path,
    config: RouteConfig,
    *,
    data: Data = None,
    phase: str = "prefill",
    batch: int | None = None,
    context: int | None = None,
    machine: str | None = None,
    samples: int = ROUTE_SAMPLES,
    length: int = ROUTE_LENGTH,
    dtype: Dtype | None = None,
    device: Any = "auto",
    progress: Progress = _silent,
    doubted: Callable[[str], object] = _warned,
) -> RouterResult:
    """Train the static routers for one phase's latency on a few sequences, and store them.

    Networks are judged by how far their predictions are from the full one's (`flextron.judge.loss.divergence`); with
    the form ``gumbel``, which learns end to end, by the loss. Without a ``dtype``, divergence from a float32 model is
    measured in bfloat16 where the device computes it fast: in 0.6 of the time, and 0.001 nats higher, all alike.

    ``batch``, ``context`` and ``machine`` say which latency table of the phase, as those of `set_budget` do.
    ``doubted`` is called with a sentence where that table may be wrong by more than 10 %: it warns, or raises.
    """
    with ElasticDirectory.open(directory) as checkpoint:
        checkpoint.check_length("route", length)
        model, tables, origin = checkpoint.model(dtype, device), checkpoint.tables, checkpoint.origin
        if machine is None:
            checkpoint.warn_of_another_use(machine_of(model))
    planner = Planner(model.elastic, tables, machine=machine_of(model))
    table = planner.table(phase, batch=batch, context=context, machine=machine)
    if table.doubt:
        doubted(table.doubt)
    # From the training text: the text that judges the routers must not have chosen them.
    tokens = windows(corpus(read_tokenizer(directory), data).train, samples, length, "route")
    model.requires_grad_(False)
    compares = dtype is None and config.form != "gumbel"
    if compares and model.dtype == torch.float32 and bf16_is_fast(model.device):
        model.to(torch.bfloat16)
    result = train_routers(
        model.elastic,
        table,
        _judge(model, tokens, config.form),
        config,
        progress,
        relaxed_loss(model, tokens) if config.form == "gumbel" else None,
    )
    result.save(directory, origin)
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
    dtype: Dtype | None = None,
    device: Any = "auto",
    progress: Progress = _silent,
    doubted: Callable[[str], object] = _warned,
) -> AdaptiveResult:
    """Train the router that chooses for every token, starting where the static routers are, and store it.

    What such routers take beside the layers is measured first where it was not yet; see `profile_adaptive`.

    Args:
        directory: an elastic checkpoint, profiled; without static routers, training starts at the uniform ladder.
        config: settings of the training.
        data: text, by default Python's own documentation; its training part is used.
        phase: the phase whose latency is trained for; budgets of every profiled phase are calibrated.
        samples: sequences to train, calibrate and judge on.
        length: tokens in a sequence.
        dtype: the weights' dtype in memory, as `flextron.from_pretrained` takes it.
        device: as `convert` takes it.
        doubted: as `route` takes it.
    """
    with ElasticDirectory.open(directory) as checkpoint:
        checkpoint.check_length("route", length)
        model, origin = checkpoint.model(dtype, device), checkpoint.origin
        planner = checkpoint.planner(machine_of(model))
        checkpoint.warn_of_another_use(machine_of(model))
    if doubt := planner.table(phase).doubt:
        doubted(doubt)
    tokens = windows(corpus(read_tokenizer(directory), data).train, samples, length, "route")
    adaptive_routing.check_sequences(
        tokens, config or AdaptiveConfig()
    )  # before anything is measured and stored
    hidden = config.hidden if config else None
    tables = _profile_adaptive(directory, model, planner.tables, progress, hidden=hidden)
    result = train_adaptive(model, tables, planner.ladder, tokens, config, phase, progress)
    ranks.first(lambda: result.save(directory, origin))
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
    dtype: Dtype = "auto",
    device: Any = "auto",
    planned: Planned = _unplanned,
    progress: Progress = _silent,
    measured: Measured = _unseen,
) -> TrainReport:
    """Train the model and one of its routers jointly, in place. A killed run goes on when it is called again.

    Both routers are stored with the new weights, all or nothing, and with what is read off them: the static one with
    its ladder, the adaptive one with a new calibration. The other one has not learnt, but is calibrated for the weights
    that have moved under it. Losses in their reports are measured again; what the surrogate said stays as `route` wrote
    it, for the surrogate itself is not kept.

    Args:
        directory: an elastic checkpoint with the router.
        config: settings; with ``distillation`` above 0 the checkpoint as it was is the teacher, or what
            `refit` began with.
        adaptive: tune the router that chooses for every token, not the static one.
        data: as `train` takes it.
        restart: discard an unfinished run instead of resuming it.
        validation_windows: sequences behind the evaluations in ``metrics.jsonl``.
        samples: sequences for the new calibration and reports; for the adaptive router, half for each.
        dtype: what the checkpoint is stored in, as `train` takes it.
        device: as `convert` takes it.
        planned, progress, measured: as in `train`.
    """
    config = config or TuneConfig()
    with ElasticDirectory.open(directory) as checkpoint:
        checkpoint.check_length("tune", config.length)
        held = _teacher_dtype(checkpoint, TUNING_FOLDER, config, restart, device)
        memory = room("tune", checkpoint.origin.elastic, config, device, held.itemsize)
        cut = cut_of(checkpoint.origin.elastic, config, device, held.itemsize)
        model = checkpoint.equipped(device=device, cut=cut)
        # routers made for other weights were left out with a warning: they are not asked for again
        static = checkpoint.static() if model.planner.ladder.origin == "router" else None
        own = checkpoint.adaptive() if model.adaptive is not None else None
        found = own if adaptive else static
        if found is None:
            command = f"flextron route {directory}" + " --adaptive" * adaptive
            raise ValueError(
                f"tune: {directory} must have a router made for its weights, got none; run `{command}`"
            )
        teacher, keep_teacher = _teacher(checkpoint, TUNING_FOLDER, config, restart, held, device, cut)
    model.stored = storage("tune", model, dtype)
    planner = planner_of(model)
    tables, ladder = by_phase(planner.here), planner.ladder
    # the ladder may have been trained on another machine's table, or another workload's
    trained = static and trained_on(planner.tables, static.phase, static.costs)
    table = trained if trained and not adaptive else planner.table(found.phase)
    goes_on = not restart and (Path(directory) / TUNING_FOLDER).is_dir()
    tokens = _text(directory, data, _tokens_in(config), device, progress, goes_on)
    report = tune_model(
        model,
        found.router.to(device),
        lambda p: table.expected(*p, adaptive=adaptive) / table.full_ms,
        tokens.train,
        config,
        Path(directory) / TUNING_FOLDER,
        teacher=teacher,
        resume=not restart,
        validation=windows(tokens.held_out, validation_windows, config.length),
        progress=_told("joint tuning", progress, measured),
        begun=keep_teacher,
        starting=partial(planned, memory),
        cached=partial(progress, "the teacher's logits"),
    )
    round_in_place("tune", model, model.stored)  # reports below are about the weights that will be stored
    judged = windows(tokens.train, samples, config.length)
    fresh: list[RouterResult | AdaptiveResult] = []
    if static and (own_table := trained or tables.get(static.phase)):
        judge = _judge(model, judged, static.config.form)
        static = static_routing.refreshed(static, model.elastic, own_table, judge)
        ladder = static.ladder
        fresh.append(static)
    if own and own.phase in tables:
        fresh.append(adaptive_routing.refreshed(own, model, tables, ladder, judged, progress))

    def beside(stage: Path, origin: Origin) -> None:
        for result in fresh:
            result.write(stage, origin)

    def store(weights: Mapping[str, Pending] | None) -> None:
        save_elastic(model, directory, beside=beside, tensors=weights)
        _discard(directory, REFIT_FOLDER)  # of other weights now

    first_with_weights(model, store)
    return report


def clean(directory: str | Path, *, unfinished: bool = False, dry_run: bool = False) -> dict[str, int]:
    """Remove what only resuming needs: the checkpoints of finished runs of `train` and `tune`, and their teachers.

    A run that was cleaned can no longer be given more steps; its metrics and what it was stay.

    Args:
        directory: an elastic checkpoint.
        unfinished: also remove those of stopped runs, which can then never be finished.
        dry_run: remove nothing.

    Returns:
        Each file that goes -> the bytes that this frees.
    """
    Origin.read(directory)
    folders = [Path(directory) / name for name in (TRAINING_FOLDER, TUNING_FOLDER)]
    with locked(directory, "clean"):
        # all runs are checked before any file is removed
        found = [p for f in folders for p in resume.clean(f, unfinished=unfinished, dry_run=True)]
        sizes = {str(p): p.stat().st_size if p.stat().st_nlink == 1 else 0 for p in found}
        if not dry_run:
            for folder in folders:
                resume.clean(folder, unfinished=unfinished)
    return sizes


def _tokens_in(config: TrainConfig) -> int:
    return config.steps * config.accumulation * config.batch_size * config.length * ranks.now().size


def _teacher_dtype(
    checkpoint: ElasticDirectory, folder: str, config: TrainConfig, restart: bool, device: torch.device
) -> torch.dtype:
    """What the teacher of a run in ``folder`` is held in: as its weights are stored, or as the run began.

    On a CPU that computes in bfloat16 it is bfloat16, to which its weights would be rounded in every step.
    """
    if not config.distillation:
        return torch.float32
    run = checkpoint.path / folder
    if not restart and resume.has_checkpoints(run):
        return resume.teacher_dtype(run)
    if device.type == "cpu" and computes_in_bf16(config, device):
        return torch.bfloat16
    own = [checkpoint.path / name for name in weight_files(checkpoint.meta["checksums"])]
    stored = {dtype for path in _parent(checkpoint) or own for dtype in stored_dtypes(path).values()}
    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}
    return narrow.get(stored.pop(), torch.float32) if len(stored) == 1 else torch.float32


def _teacher(
    checkpoint: ElasticDirectory,
    folder: str,
    config: TrainConfig,
    restart: bool,
    dtype: torch.dtype,
    device: torch.device,
    cut: Cut | None,
) -> tuple[Any, Callable[[], None] | None]:
    """(the teacher of a run in ``folder``, a call that keeps it there when the run begins), or None twice."""
    if not config.distillation:
        return None, None
    teacher = checkpoint.model(dtype, device, cut)
    run = checkpoint.path / folder
    kept = sorted(run.glob(resume.TEACHER_FILES))
    goes_on = not restart and kept and resume.has_checkpoints(run)
    weights, parent = weight_files(checkpoint.meta["checksums"]), _parent(checkpoint)
    if source := kept if goes_on else parent:
        overwrite(dict(teacher.named_parameters()), source)

    def keep() -> None:
        if not parent:
            return _keep_weights(checkpoint.path, weights, run)
        for path in parent:
            _link(path, run / path.name)

    return teacher.requires_grad_(False), keep


def _keep_weights(directory: Path, names: Iterable[str], folder: Path) -> None:
    """Keep a checkpoint's weights in a folder without a teacher, as one's."""
    folder.mkdir(exist_ok=True)
    for name in names:
        _link(directory / name, folder / name.replace("model", "teacher", 1))


def _link(source: Path, target: Path) -> None:
    """Hard-link a file that is only ever replaced, never written into; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _discard(directory: str | Path, *names: str) -> None:
    for name in names:
        path = Path(directory) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
