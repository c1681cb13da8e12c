"""Fit what comes last in MLPs and attentions anew, so that every prefix of its inputs serves as well as it can.

``y = W h`` at full width becomes ``W[:, :c] h[:c]`` at a width c: what the other inputs would have added is lost, but
much of it can be told from those that stay. One solve for each layer finds the W that is best for all widths at once,

    minimise over W   sum_c s_c |W_parent H - W[:, :c] H[:c]|^2  +  r |W - W_parent|^2,

over the hidden features H [inputs, tokens] of the full network. With ``G = H H^T``, and ``S_ij`` the sum of the shares
s_c of the widths that keep both i and j, ``W (G * S + r) = (W_parent G) * diag(S) + r W_parent``: ridge regression
(Hoerl and Kennard 1970) whose prefixes share their weights. It takes no gradient, and nothing at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flextron.config import AXES, ElasticConfig, Widths
from flextron.conversion.importance import check_tokens
from flextron.nn.anatomy import Sizes, places
from flextron.nn.plain import build
from flextron.nn.protocol import Elastic

NARROWER, RIDGE = 0.3, 0.1
_JUDGED = 8  # one of so many sequences judges a fit, and is not fitted
_ROOM = 2**30  # bytes of inner products that are gathered in one pass over the text
Progress = Callable[[int, int], Any]  # (sequences read, sequences to read in all passes)


@dataclass(frozen=True)
class Refit:
    """What a fit changed. Errors are shares of the output's mean square on held-out tokens, the mean over layers.

    Attributes:
        tokens: fitted on.
        errors: for each axis, ``{"width", "before", "after"}`` of every width.
        kept: projections that stayed as they were, since the held-out error would have grown.
    """

    tokens: int
    errors: dict[str, list[dict[str, float]]]
    kept: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Job:
    """One projection.

    Attributes:
        axis: what its inputs follow.
        weight: [outputs, inputs] view of the parameter.
        module: the one of the stock model that is called with its inputs.
        kept: width -> [inputs] bool, the inputs that it keeps.
        shares: width -> how much it counts.
        products: the inner products H H^T of the tokens that are fitted, and of those that judge.
    """

    name: str
    axis: str
    layer: int
    weight: Tensor
    module: nn.Module
    kept: dict[int, Tensor]
    shares: dict[int, float]
    products: list[Tensor]

    @property
    def bytes(self) -> int:
        return 2 * 4 * self.weight.shape[1] ** 2


@torch.no_grad()
def refit(
    model: Elastic,
    calibration: Tensor,
    *,
    only: Widths | None = None,
    narrower: float = NARROWER,
    ridge: float = RIDGE,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Refit:
    """Fit the last projection of every MLP and attention of an elastic model, in place.

    Each is fitted alone, to what it gives in the full network. Projections of experts stay as they are. Memory: up to
    1 GB of inner products beside the model, or those of one layer; where they do not fit, the text is read again.

    Args:
        model: with plain weights; its widths do not matter.
        calibration: [n, L] int64 token ids, n at least 2; an eighth of the sequences judges the fit, and is not fitted.
        only: the one network that the weights are to serve from now on; by default every width of the menus.
        narrower: how much a narrower width counts beside the full one, which counts 1.
        ridge: r as a share of the mean square of an input; more of it keeps weights nearer to what they were.
        batch_size: sequences in a forward pass.
        progress: called after each pass.

    Raises:
        ValueError: an argument is not what it must be. Nothing was changed.
    """
    check_fit(model, calibration, narrower, ridge)
    if only is not None:
        model.elastic.check(only)
    judged = max(1, len(calibration) // _JUDGED)
    parts = calibration[judged:], calibration[:judged]
    jobs, stock = _jobs(model, only, narrower)
    passes = _passes(jobs)
    read, total = 0, len(passes) * sum(map(len, parts))
    found: list[tuple[_Job, dict[int, tuple[float, float]]]] = []
    kept = []
    for own in passes:  # the last layers first: what a layer is given must be the full network's still
        for which, rows in enumerate(parts):
            with _gathering(own, which):
                for batch in rows.split(batch_size):
                    stock.base_model(input_ids=batch.to(model.device), use_cache=False)
                    read += len(batch)
                    if progress:
                        progress(read, total)
        for job in own:
            fitted, held = job.products
            job.products.clear()
            weight = _solved(job, fitted, ridge)
            errors = {c: (_error(job, c, job.weight, held), _error(job, c, weight, held)) for c in job.kept}
            before, after = (sum(job.shares[c] * error[i] for c, error in errors.items()) for i in (0, 1))
            if after < before:
                job.weight.copy_(weight)
            else:
                errors = {c: (e[0], e[0]) for c, e in errors.items()}
                kept.append(job.name)
            found.append((job, errors))
    return Refit(calibration[judged:].numel(), _table(found), tuple(kept))


def check_fit(model: Elastic, calibration: Tensor, narrower: float, ridge: float) -> None:
    """Raise ValueError unless a fit can begin with these."""
    check_shares(narrower, ridge)
    check_tokens("refit", calibration, model.elastic.vocab_size, sequences=2)


def check_shares(narrower: float, ridge: float) -> None:
    """Raise ValueError where a fit's two shares are none."""
    for name, value in (("narrower", narrower), ("ridge", ridge)):
        if not 0 < value <= 1:
            raise ValueError(f"refit: {name} must lie in (0, 1], got {value}")


@contextmanager
def refitted(model: Elastic, only: Widths, calibration: Tensor, **options: Any) -> Iterator[Refit]:
    """Within a ``with`` block, a model whose weights serve one network alone; see `refit`."""
    parameters = _fitted(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        yield refit(model, calibration, only=only, **options)
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])


def _fitted(model: Elastic) -> dict[str, nn.Parameter]:
    """The weights that are fitted, by name, layer by layer."""
    anatomy, parameters = model.anatomy, dict(model.named_parameters())
    stems = [anatomy.path(anatomy.attention, anatomy.output)]
    if not anatomy.experts:
        stems.append(anatomy.path(anatomy.mlp, anatomy.down))
    names = [
        f"{anatomy.layer_path(i)}.{stem}.weight" for i in range(model.elastic.num_layers) for stem in stems
    ]
    return {name: parameters[name] for name in names}


def _jobs(model: Elastic, only: Widths | None, narrower: float) -> tuple[list[_Job], Any]:
    """What is to be fitted, and the stock model of the full network, which has the elastic one's memory."""
    config, anatomy = model.elastic, model.anatomy
    full = config.full()
    stock = build(model, full, "uniform", shares=True).eval()
    whole, jobs = anatomy.whole(model.config), []
    for name, parameter in _fitted(model).items():
        path = name.removesuffix(".weight")
        axis = "heads" if path.endswith(f"{anatomy.attention}.{anatomy.output}") else "mlp"
        layer = int(path.removeprefix(f"{anatomy.base}.{anatomy.layers}.").partition(".")[0])
        most = getattr(full, axis)[layer]
        menu = config.menus[AXES.index(axis)] if only is None else (getattr(only, axis)[layer],)
        widths = [c for c in menu if c]
        inputs = "neurons" if axis == "mlp" else "query"
        size = parameter.shape[0 if anatomy.transposed else 1]
        kept = {}
        for c in widths:
            part = Sizes(c, *whole[1:]) if axis == "mlp" else Sizes(whole.neurons, *_heads(config, c))
            kept[c] = torch.zeros(size, dtype=torch.bool)
            kept[c][places((inputs,), part, whole, config.head_dim)] = True
        shares = {c: 1.0 if c == most or only is not None else narrower for c in widths}
        weight = parameter.detach().T if anatomy.transposed else parameter.detach()
        jobs.append(_Job(name, axis, layer, weight, stock.get_submodule(path), kept, shares, []))
    return jobs, stock


def _heads(config: ElasticConfig, heads: int) -> tuple[int, int]:
    """(groups, query heads of each group) that a choice keeps."""
    return (heads, config.heads_per_group) if config.unit == "kv_group" else (config.num_kv_heads, heads)


def _passes(jobs: list[_Job]) -> list[list[_Job]]:
    """Jobs that are gathered together, the last layers first; those of one layer always are."""
    passes: list[list[_Job]] = []
    for layer in sorted({job.layer for job in jobs}, reverse=True):
        own = [job for job in jobs if job.layer == layer and job.kept]
        if passes and sum(job.bytes for job in [*passes[-1], *own]) <= _ROOM:
            passes[-1] += own
        elif own:
            passes.append(own)
    return passes


@contextmanager
def _gathering(jobs: list[_Job], which: int) -> Iterator[None]:
    """Within a ``with`` block, add up the inner products of what the stock model gives each projection."""

    def see(job: _Job, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        job.products[which].addmm_(x.T, x)

    handles = []
    for job in jobs:
        job.products.append(torch.zeros(2 * job.weight.shape[1:], device=job.weight.device))
        handles.append(job.module.register_forward_pre_hook(lambda _, args, job=job: see(job, args[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _solved(job: _Job, products: Tensor, ridge: float) -> Tensor:
    """The best weight, [outputs, inputs] float64."""
    G, parent = products.double(), job.weight.double()
    share = torch.zeros_like(G)  # S
    for c, kept in job.kept.items():
        mask = kept.to(G.device, G.dtype)
        share += job.shares[c] * torch.outer(mask, mask)
    r = ridge * G.diagonal().mean() * sum(job.shares.values())
    right = (parent @ G) * share.diagonal() + r * parent
    left = G * share
    left.diagonal().add_(r)
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(left)).T


def _error(job: _Job, width: int, weight: Tensor, products: Tensor) -> float:
    """The mean square of what a width misses, as a share of that of the parent's output."""
    G, parent = products.double(), job.weight.double()
    missed = parent - weight.double() * job.kept[width].to(G.device)
    return float(((missed @ G) * missed).sum() / ((parent @ G) * parent).sum().clamp(min=1e-30))


def _table(found: list[tuple[_Job, dict[int, tuple[float, float]]]]) -> dict[str, list[dict[str, float]]]:
    """The errors of each width of an axis, the mean over the layers that have it."""
    table: dict[str, list[dict[str, float]]] = {}
    for axis in AXES:
        of_axis = [errors for job, errors in found if job.axis == axis]
        table[axis] = []
        for width in sorted({c for errors in of_axis for c in errors}):
            pairs = [errors[width] for errors in of_axis if width in errors]
            before, after = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            table[axis].append({"width": width, "before": before, "after": after})
    return table
