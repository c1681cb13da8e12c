"""Training of the adaptive router: through the model end to end, or through a surrogate of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from flextron import ranks
from flextron.artefacts.adaptive_router import AdaptiveReport, AdaptiveResult, costs_of
from flextron.artefacts.ladder import Ladder
from flextron.artefacts.latency_table import LatencyTable
from flextron.artefacts.reports import FitReport, GateReport
from flextron.config import ElasticConfig, Widths
from flextron.judge.loss import evaluate, restored, sequence_losses
from flextron.nn import Dial
from flextron.nn.policy import Given, Policy, Sampled, menus_of
from flextron.nn.protocol import Elastic
from flextron.nn.router import AdaptiveRouter, Indices, Probabilities, anneal, default_hidden
from flextron.recipes import JUDGING, AdaptiveConfig
from flextron.routing.calibrate import calibrate, fractions_of_all
from flextron.routing.fit import random_widths
from flextron.routing.gate import Gate, Progress, RouterTraining, reachable
from flextron.routing.learning import latency_miss, learning_policy, mean_choices
from flextron.routing.search import likely
from flextron.routing.sharing import SharedNoise, mean_of_all, whole
from flextron.routing.surrogate import ReplayBuffer, Surrogate, SurrogateFitter, fit_report

_CONFIDENCE = 0.6  # probability of the static choice at the start: one to leave, but not at once
_SURROGATE_STEPS, _REFIT_STEPS = 600, 30  # of its first fit, and after each observation


def train_adaptive(
    model: Elastic,
    tables: dict[str, LatencyTable],
    ladder: Ladder,
    tokens: Tensor,
    config: AdaptiveConfig | None = None,
    phase: str = "prefill",
    progress: Progress | None = None,
) -> AdaptiveResult:
    """Train the adaptive router of a frozen elastic model, and calibrate it.

    Loss: cross-entropy of the model with relaxed choices (`flextron.nn.policy.Relaxed`) at a target drawn for each
    sequence, or what the surrogate predicts of it, and the latency term on the mean over the tokens of each target.

    Args:
        model: elastic; its dial and its parameters' ``requires_grad`` are restored.
        tables: latency tables by phase; the router is calibrated for all of them.
        ladder: the static routers' readout, where the router starts.
        tokens: [n, length] int64, sequences to train, calibrate and judge on.
        config: see `AdaptiveConfig`.
        phase: the phase whose latency is trained for.
        progress: called with (what is being done, done, total).
    """
    options = config or AdaptiveConfig()
    check_sequences(tokens, options)
    quiet = progress or (lambda *_: None)
    kind = _SurrogateTraining if options.form == "surrogate" else _Training
    training = kind(model, tables[phase], ladder, tokens[: -options.judged], options, quiet)
    with _frozen(model):
        training.run()
        router = training.router.requires_grad_(False)
        model.attach_router(router)
        calibrate(router, model, tables, tokens[: options.calibration], quiet)
        full, reports = report(model, tables[phase], ladder, tokens[-options.judged :], router.targets[:-1])
    return AdaptiveResult(
        router,
        reports,
        training.dropped,
        full,
        tuple(training.history),
        options,
        phase,
        costs_of(tables),
        *training.surrogate_reports(),
    )


def check_sequences(tokens: Tensor, options: AdaptiveConfig) -> None:
    """Refuse fewer sequences than training and its report need, on so many processes."""
    needed = options.judged + max(options.calibration, 1)
    if tokens.dim() != 2 or len(tokens) < needed:
        raise ValueError(
            f"train_adaptive: tokens must be at least {needed} sequences (judged and calibration), "
            f"got {list(tokens.shape)}"
        )
    for name in ("batch", "calibration", "judged"):
        if getattr(options, name) < ranks.now().size:
            raise ValueError(
                f"train_adaptive: {name} must be at least {ranks.now().size} for as many processes, "
                f"got {getattr(options, name)}"
            )


def refreshed(
    result: AdaptiveResult,
    model: Elastic,
    tables: dict[str, LatencyTable],
    ladder: Ladder,
    tokens: Tensor,
    progress: Progress = lambda *_: None,
) -> AdaptiveResult:
    """Calibrate and judge again after router and model were tuned, each on one half of ``tokens``."""
    half = len(tokens) // 2
    with _frozen(model):
        model.attach_router(result.router)
        calibrate(result.router, model, tables, tokens[:half], progress)
        table = tables[result.phase]
        full, reports = report(model, table, ladder, tokens[half:], result.router.targets[:-1])
    return replace(result, targets=reports, full_loss=full, costs=costs_of(tables))


@contextmanager
def _frozen(model: Elastic) -> Iterator[None]:
    """Put a model into eval mode without gradients, and restore it at the end of the ``with`` block."""
    with restored(model):
        model.requires_grad_(False).eval()
        yield


def start_router(
    config: ElasticConfig, table: LatencyTable, ladder: Ladder, options: AdaptiveConfig
) -> tuple[AdaptiveRouter, tuple[float, ...]]:
    """(a router that starts with the ladder's choices, the targets that no network is fast enough for)."""
    fastest = table.smallest_adaptive_ms / table.full_ms
    targets, dropped = reachable("train_adaptive", options.targets, fastest)
    router = AdaptiveRouter(
        config.num_layers,
        config.hidden_size,
        config.choices,
        targets,
        options.hidden or default_hidden(config),
        options.seed,
    )
    adaptive = partial(table.predict, adaptive=True)
    # the full model's own time may be above 1 with a router
    rungs = [ladder.within(adaptive, t * table.full_ms) for t in targets[:-1]] + [config.full()]
    parts = [p.log() for p in likely(config, rungs, _CONFIDENCE)]  # [targets, L, C]
    with torch.no_grad():
        router.base.copy_(torch.cat(parts, dim=-1).transpose(0, 1))
        router.ramp.copy_(torch.cat([_ramp(costs[0]) for costs in table.by_axis]) / _mean_step(table))
    return router, dropped


def _ramp(costs: Sequence[float]) -> Tensor:
    return torch.tensor(costs) - costs[0]


def _mean_step(table: LatencyTable) -> float:
    """Milliseconds that one step of a choice costs, on average: the unit of an offset."""
    steps = sum(len(costs[0]) - 1 for costs in table.by_axis)
    return max(sum(costs[0][-1] - costs[0][0] for costs in table.by_axis) / max(1, steps), 1e-12)


class _Training(RouterTraining):
    """The state of the training in one call of `train_adaptive`."""

    router: AdaptiveRouter
    options: AdaptiveConfig

    def __init__(
        self,
        model: Elastic,
        table: LatencyTable,
        ladder: Ladder,
        tokens: Tensor,
        options: AdaptiveConfig,
        progress: Progress,
    ) -> None:
        table.check(model.elastic)
        self.model, self.table, self.tokens = model, table, tokens
        self.device = next(model.parameters()).device
        router, self.dropped = start_router(model.elastic, table, ladder, options)
        gate = Gate(
            options.threshold, math.ceil(options.patience * options.steps), options.form == "surrogate"
        )
        super().__init__(router.to(self.device), options, gate, progress)
        # one generator for each purpose: no draw shifts another purpose's
        self.noise = SharedNoise(options.seed * 4 + 1, options.batch)
        self.draws = torch.Generator().manual_seed(options.seed * 4 + 2)

    def run(self) -> None:
        self.optimise("adaptive router steps")

    def surrogate_reports(self) -> tuple[FitReport | None, GateReport | None]:
        return None, None

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        loss, miss = self._terms(step)
        total = loss + self.options.latency_weight * miss
        return total, {"loss": float(loss.detach()), "latency_miss": float(miss.detach())}

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Sequences [B, T], and for each a trained target below 1."""
        B, below = self.options.batch, self.router.targets[:-1]
        picks = torch.randint(len(self.tokens), (B,), generator=self.draws)
        which = torch.randint(len(below), (B,), generator=self.draws)
        return self.tokens[picks].to(self.device), torch.tensor(below)[which].to(self.device)

    def _fraction(self, p: Probabilities) -> Tensor:
        return self.table.expected(*p, adaptive=True) / self.table.full_ms

    def _terms(self, step: int) -> tuple[Tensor, Tensor]:
        """The loss of the next token, and the latency term."""
        ids, tau = self._draw()
        annealed, mine = anneal(step, self.options.steps), ranks.part(len(ids))
        policy = learning_policy(
            self.model, self.router, tau[mine], self.noise, *annealed, self.options.gates
        )
        self.model.set_policy(policy, self.model.elastic.full(), "all")
        losses = whole(sequence_losses(self.model, ids[mine]), len(ids))
        spent = whole(self._fraction(mean_choices(policy, len(ids[mine]))), len(ids))
        return losses.mean(), latency_miss(spent, tau)


class _SurrogateTraining(_Training):
    """Training on a surrogate's predictions; the model runs forward only, at the widths that tokens choose.

    A step runs ``batch`` sequences at one target without a gradient, at the router's noisy choices. Their loss above
    the full model's, and the shares of tokens that made each choice, judge the surrogate, which then learns them; the
    router learns from what it predicts at the probabilities of the choices, mean over the tokens.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config, seed = self.model.elastic, self.options.seed * 4 + 3
        self.surrogate = Surrogate(config.num_layers, config.choices, seed=seed, mixed=True)
        self.fitter = SurrogateFitter(self.surrogate, seed)
        self.train, self.held_out = ReplayBuffer(config), ReplayBuffer(config)
        self.rng, self.menus = random.Random(seed), menus_of(config, self.device)
        self.observed = 0

    def run(self) -> None:
        options = self.options
        self.full = self._full_losses()
        for done in range(options.prefill):
            ids, full, _ = self._one_target()
            choices = self._random_choices(ids.numel())
            of_sequences = (axis.unflatten(0, (len(ids), -1)) for axis in choices)
            own = Indices(*(axis[ranks.part(len(ids))].flatten(0, 1) for axis in of_sequences))
            losses = self._losses_of(ids, Given(own, self.menus))
            self._remember(self._shares(choices), float((losses - full).mean()))
            self.progress("random choices", done + 1, options.prefill)
        self.surrogate.start(*self.train.tensors())
        self.fitter.fit(*self.train.tensors(), _SURROGATE_STEPS)
        self.gate.error = fit_report(self.surrogate, *self.held_out.tensors()).mean_error
        super().run()

    def surrogate_reports(self) -> tuple[FitReport | None, GateReport | None]:
        return fit_report(self.surrogate, *self.held_out.tensors()), self.gate.report()

    def waits(self, step: int) -> bool:
        self.seen = self._observe(step)
        return self.gate.is_waiting()

    def _terms(self, step: int) -> tuple[Tensor, Tensor]:
        p, tau = Probabilities(*(axis.cpu() for axis in self.seen[0])), self.seen[1].cpu()
        spent = self._fraction(p)
        return self.surrogate.loss(p, spent).mean(), latency_miss(spent, tau)

    def _observe(self, step: int) -> tuple[Probabilities, Tensor]:
        """Run the router's own choices, judge the surrogate by them, and let it learn them.

        Returns the probabilities of the choices, mean over all tokens, [1, L, C] with a gradient, and the target [1].
        """
        ids, full, tau = self._one_target()
        annealed = anneal(step, self.options.steps)
        tau_of = tau.expand(len(ids[ranks.part(len(ids))]))
        policy = cast(
            Sampled, learning_policy(self.model, self.router, tau_of, self.noise, *annealed, "sampled")
        )
        loss = float((self._losses_of(ids, policy) - full).mean())
        by_axis = zip(*policy.chosen.values(), strict=True)
        shares = self._shares(Indices(*(torch.stack(axis, 1) for axis in by_axis)))
        shares = Probabilities(*(mean_of_all(axis, len(ids)) for axis in shares))
        with torch.no_grad():
            predicted = float(self.surrogate.loss(shares, self._fraction(shares)))
        self.gate.see(predicted, loss)
        self._remember(shares, loss)
        self.fitter.fit(*self.train.tensors(), _REFIT_STEPS)
        p = mean_choices(policy, 1)
        return Probabilities(*(mean_of_all(axis, len(ids)) for axis in p)), tau

    def _one_target(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences [B, T], the full model's loss of each [B], and one trained target below 1 [1]."""
        below = self.router.targets[:-1]
        picks = torch.randint(len(self.tokens), (self.options.batch,), generator=self.draws)
        which = torch.randint(len(below), (1,), generator=self.draws)
        return (
            self.tokens[picks].to(self.device),
            self.full[picks],
            torch.tensor(below)[which].to(self.device),
        )

    def _random_choices(self, count: int) -> Indices:
        """Indices [N, L]: in every layer each token takes one of two random widths, with that layer's probability."""
        config = self.model.elastic
        found = []
        for axis in config.axes:
            pair = (getattr(random_widths(config, self.rng), axis.name) for _ in range(2))
            a, b = (torch.tensor([axis.menu.index(n) for n in layers]) for layers in pair)
            share = torch.rand(config.num_layers, generator=self.draws)
            found.append(
                torch.where(torch.rand(count, config.num_layers, generator=self.draws) < share, a, b)
            )
        return Indices(*(axis.to(self.device) for axis in found))

    def _shares(self, choices: Indices) -> Probabilities:
        """Indices [N, L] -> share of the tokens that chose each entry, [L, C], on the CPU, where the surrogate is."""
        return Probabilities(
            *(
                functional.one_hot(axis, len(menu)).float().mean(0).cpu()
                for axis, menu in zip(choices, self.menus, strict=True)
            )
        )

    def _remember(self, shares: Probabilities, loss: float) -> None:
        self.observed += 1
        buffer = self.train if self.observed % JUDGING else self.held_out
        buffer.add_shares(shares, float(self._fraction(shares)), loss)

    def _full_losses(self) -> Tensor:
        return torch.cat([self._losses_of(ids, None) for ids in self.tokens.split(self.options.batch)])

    @torch.no_grad()
    def _losses_of(self, ids: Tensor, policy: Policy | None) -> Tensor:
        """Each sequence's mean loss, [B]; ``policy`` is about this process's part of them."""
        self.model.set_policy(policy, self.model.elastic.full(), "all")
        return whole(sequence_losses(self.model, ids[ranks.part(len(ids))].to(self.device)), len(ids))


def report(
    model: Elastic, table: LatencyTable, ladder: Ladder, tokens: Tensor, targets: Sequence[float]
) -> tuple[float, tuple[AdaptiveReport, ...]]:
    """(the full model's loss, each target's comparison with the ladder) on sequences of their own."""
    phase = table.workload.phase
    found = fractions_of_all(model, table, tokens, targets, phase).tolist()
    static = [ladder.within(table.predict, t * table.full_ms) for t in targets]
    dials = [Dial.adaptive(model.elastic, [t], phase) for t in targets]
    judged: list[Widths | Dial] = [model.elastic.full(), *dials, *static]
    full, *losses = ranks.over_rows(
        tokens, lambda mine: torch.tensor(evaluate(model, mine, judged), dtype=torch.float64)
    ).tolist()
    n = len(targets)
    return full, tuple(
        AdaptiveReport(targets[i], found[i], losses[i], table.fraction(static[i]), losses[n + i])
        for i in range(n)
    )
