"""Training of the static routers: through the surrogate and the latency table, the LLM itself frozen."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from flextron.artefacts.ladder import Ladder, router_ladder, uniform_ladder
from flextron.artefacts.latency_table import LatencyTable
from flextron.artefacts.static_router import RouterResult, TargetReport
from flextron.config import ElasticConfig, Widths
from flextron.nn.router import GumbelSampler, Indices, Logits, Probabilities, StaticRouter, anneal
from flextron.recipes import REPORTED, RouteConfig
from flextron.routing.descent import descend, steps_from
from flextron.routing.fit import random_widths
from flextron.routing.gate import Gate, Progress, RouterTraining, reachable
from flextron.routing.learning import TOLERANCE
from flextron.routing.search import likely, predicted_losses, search
from flextron.routing.surrogate import ReplayBuffer, Surrogate, SurrogateFitter, fit_report

_WARM_STEPS = 200  # steps of imitation, before anything else is learnt
_WARM_CONFIDENCE = 0.5  # probability of an imitated choice: a start, not a decision
_SURE = 0.95  # probability of a choice that no later step improves
_LEAST_STAKE = 0.02  # nats: differences below this are noise, and get no more weight for being small
_REFIT = 20  # a new observation is worth one twentieth of the first fit's steps

LossFn = Callable[[Widths], float]


def refreshed(
    result: RouterResult, config: ElasticConfig, table: LatencyTable, loss_fn: LossFn
) -> RouterResult:
    """Read the ladder off again, and observe its losses, after router and model were tuned."""
    ladder, full = router_ladder(config, result.router), loss_fn(config.full())
    targets = []
    for t in result.targets:
        limit = t.target * table.full_ms
        routed, uniform = (r.within(table.predict, limit) for r in (ladder, uniform_ladder(config)))
        targets.append(
            replace(
                t,
                rung_fraction=table.fraction(routed),
                routed_observed=loss_fn(routed) - full,
                uniform_observed=loss_fn(uniform) - full,
                search_observed=loss_fn(t.search_widths) - full,
            )
        )
    return replace(result, ladder=ladder, targets=tuple(targets))


def train_routers(
    config: ElasticConfig,
    table: LatencyTable,
    loss_fn: LossFn,
    route_config: RouteConfig | None = None,
    progress: Progress | None = None,
    relaxed: Callable[[Probabilities], Tensor] | None = None,
) -> RouterResult:
    """Train the static routers of a frozen elastic model.

    The surrogate is filled with random configurations; then the routers take steps on its prediction and the
    latency term, while their own proposals are now and then evaluated for real and added. Deterministic: the
    same ``loss_fn`` and seed give the same routers.

    Args:
        config: the menus.
        table: latency table of the phase that the targets are about.
        loss_fn: the LLM's loss in nats with these widths, always on the same tokens (the full model's is
            subtracted).
        route_config: see `RouteConfig`.
        progress: called with (what is being done, done, total).
        relaxed: for the form ``"gumbel"``: the LLM's loss at n rows of choice probabilities, [n] nats with a gradient,
            [n, L, C], on any tokens (`flextron.routing.learning.relaxed_loss`).

    Raises:
        ValueError: no target below 1 can be met by any network, or ``relaxed`` is given for another form.
    """
    table.check(config)
    options = route_config or RouteConfig()
    if (relaxed is not None) != (options.form == "gumbel"):
        given = "none" if relaxed is None else "one"
        raise ValueError(
            f"train_routers: relaxed must be given exactly for the form gumbel, got {given} for {options.form}"
        )
    return _Training(config, table, loss_fn, options, progress or (lambda *_: None), relaxed).run()


class _Training(RouterTraining):
    """The state of one call of `train_routers`."""

    router: StaticRouter
    options: RouteConfig

    def __init__(
        self,
        config: ElasticConfig,
        table: LatencyTable,
        loss_fn: LossFn,
        options: RouteConfig,
        progress: Progress,
        relaxed: Callable[[Probabilities], Tensor] | None,
    ) -> None:
        fastest = table.smallest_ms / table.full_ms
        targets, self.dropped = reachable("train_routers", options.targets, fastest)
        self.config, self.table, self.loss_fn, self.relaxed = config, table, loss_fn, relaxed
        self.targets = torch.tensor(targets)
        layers, counts = config.num_layers, config.choices
        # one generator for each purpose: no draw shifts another purpose's
        seeds = [options.seed * 8 + i for i in range(6)]
        router = StaticRouter(layers, counts, targets, options.hidden, seed=seeds[0])
        super().__init__(router, options, Gate(options.threshold, guards=relaxed is None), progress)
        self.surrogate = Surrogate(layers, counts, options.surrogate_hidden, seed=seeds[1])
        self.fitter = SurrogateFitter(self.surrogate, seeds[2])
        self.noise = GumbelSampler(seeds[3])
        self.draws = torch.Generator().manual_seed(seeds[4])
        self.rng = random.Random(seeds[5])
        self.train, self.held_out = ReplayBuffer(config), ReplayBuffer(config)
        self.uniform = uniform_ladder(config)
        self.single_steps = len(steps_from(config, config.full()))
        if options.form == "steps" and self._unreported() <= self.single_steps:
            least = 1 + self.single_steps + REPORTED * (len(targets) - 1)
            raise ValueError(
                f"train_routers: evaluations must be at least {least} for the form steps (the full model, its "
                f"{self.single_steps} steps, {REPORTED} for each target), got {options.evaluations}"
            )
        self.full_loss = 0.0
        self.evaluations = self.observed = 0

    def run(self) -> RouterResult:
        self.full_loss = self._loss(self.config.full())
        self.steps = self._descend() if self.options.form == "steps" else None
        if self.steps is None:
            self._fill()
        self._fit_first()
        self._imitate_first()
        if self.options.form in ("surrogate", "gumbel"):
            self.active = self._unreported() - self.evaluations
            self.gate.patience = int(self.active * self.options.patience)
            self.optimise("router steps")
        ladder = router_ladder(self.config, self.router)
        return RouterResult(
            router=self.router,
            ladder=ladder,
            surrogate=fit_report(self.surrogate, *self.held_out.tensors()),
            gate=self.gate.report(),
            targets=tuple(self._report(ladder, t) for t in self.router.targets[:-1]),
            dropped_targets=self.dropped,
            evaluations=self.evaluations,
            history=tuple(self.history),
            config=self.options,
            phase=self.table.workload.phase,
            costs=self.table.costs,
        )

    def _loss(self, widths: Widths) -> float:
        """The LLM's loss, in nats above the full model's."""
        self.evaluations += 1
        return float(self.loss_fn(widths)) - self.full_loss

    def _fill(self) -> None:
        """Fill the replay buffers with random configurations."""
        total = self.options.prefill
        every = self._judging()
        for done in range(total):
            widths = self._new(lambda _: random_widths(self.config, self.rng))
            if widths is None:
                break
            self._remember(widths, self._loss(widths), done % every == every - 1)
            self.progress("random configurations", done + 1, total)

    def _descend(self) -> Ladder:
        """Find a ladder by measured steps, and fill the replay buffers with them."""
        every = self._judging()

        def observed(widths: Widths) -> float:
            loss, done = self._loss(widths), self.evaluations - 1  # the first was the full model
            self._remember(widths, loss, done % every == 0)
            self.progress("measured steps", done, self.single_steps)
            return loss

        return descend(self.config, self.table, observed)

    def _judging(self) -> int:
        """One of so many observations judges the surrogate, and is not fitted."""
        return max(2, round(1 / self.options.held_out))

    def _remember(self, widths: Widths, loss: float, judges: bool) -> None:
        (self.held_out if judges else self.train).add(widths, self.table.fraction(widths), loss)

    def _fit_first(self) -> None:
        self.surrogate.start(*self.train.tensors())
        self._fit(self.options.surrogate_steps)
        self.gate.error = fit_report(self.surrogate, *self.held_out.tensors()).mean_error

    def _new(self, draw: Callable[[int], Widths]) -> Widths | None:
        """The first configuration from ``draw`` (called with 0, 1, ..) that is in no buffer; None after 20 tries."""
        for tries in range(20):
            widths = draw(tries)
            if widths not in self.train and widths not in self.held_out and widths != self.config.full():
                return widths
        return None

    def _unreported(self) -> int:
        """Evaluations that are left beside those of the report."""
        return self.options.evaluations - REPORTED * (len(self.targets) - 1)

    def _fit(self, steps: int) -> None:
        self.fitter.fit(*self.train.tensors(), steps)

    def _imitate_first(self) -> None:
        """Start the routers near what search finds on the surrogate as it is now, where the targets are met.

        Started near the uniform ladder they ended 1 to 2 % of the loss above what search finds, at the small
        targets most: few steps are left there, and a better network differs from theirs by several at once.
        End to end, where no surrogate is used, they do start there; and search alone ends where it starts.
        """
        limits = [t * self.table.full_ms for t in self.router.targets]
        rungs = [self.uniform.within(self.table.predict, limit) for limit in limits]
        self.urgency = 1 / (1 - self.targets).clamp_min(0.05)
        self.stakes = predicted_losses(self.config, self.table, self.surrogate, rungs).clamp_min(_LEAST_STAKE)
        if self.options.form == "gumbel":
            self._imitate(rungs, _WARM_CONFIDENCE)
            return
        if self.steps is not None:
            found = [self.steps.within(self.table.predict, limit) for limit in limits]
        else:
            found = [self._search(t, [rung]) for t, rung in zip(self.router.targets, rungs, strict=True)]
        self._imitate(found, _WARM_CONFIDENCE if self.options.form == "surrogate" else _SURE)

    def _imitate(self, found: list[Widths], confidence: float) -> None:
        """Let the router choose ``found`` at its targets, with this probability."""
        wanted = likely(self.config, found, confidence)
        for _ in range(_WARM_STEPS):
            pairs = zip(self.router(self.targets), wanted, strict=True)
            mlp, heads = ((p * logits.log_softmax(-1)).sum(-1).mean() for logits, p in pairs)
            self.minimise(-(mlp + heads))
        self.forget()

    def _observe(self, step: int) -> bool:
        """Evaluate a proposal of the router, and learn from it. False: there is nothing new to see."""
        proposal = self._propose(step)
        widths = self._new(lambda tries: self._jittered(proposal, tries))
        if widths is None:
            return False
        predicted = float(predicted_losses(self.config, self.table, self.surrogate, [widths])[0])
        loss = self._loss(widths)
        self.gate.see(predicted, loss)
        self.train.add(widths, self.table.fraction(widths), loss)
        self._fit(max(1, self.options.surrogate_steps // _REFIT))
        return True

    @torch.no_grad()
    def _propose(self, step: int) -> Widths:
        """What the router would choose now, with noise, for some trained target below 1."""
        target = self.targets[torch.randint(len(self.targets) - 1, (), generator=self.draws)]
        drawn = self.noise(self.router(target), *anneal(step, self.options.steps))
        return self._widths(Indices(*(p.argmax(-1) for p in drawn)))

    def _jittered(self, widths: Widths, changes: int) -> Widths:
        """``widths`` with this many random changes: a neighbour, where ``widths`` itself is known already."""
        layers = widths.to_dict()
        for _ in range(changes):
            axis = self.rng.choice(self.config.axes)
            layers[axis.name][self.rng.randrange(self.config.num_layers)] = self.rng.choice(axis.menu)
        return Widths(**{name: tuple(own) for name, own in layers.items()})

    def _widths(self, indices: Indices) -> Widths:
        return self.config.widths(axis.tolist() for axis in indices)

    def waits(self, step: int) -> bool:
        return self.gate.is_waiting() and self._observe(step)

    def after(self, step: int) -> dict[str, float]:
        """Evaluate proposals of the router at an even pace."""
        due = (self.active - self.gate.waited) * step / self.options.steps
        if self.relaxed is None and self.observed < due:
            self.observed += self._observe(step)
        return {"surrogate_error": self.gate.error}

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        temperature, scale = anneal(step, self.options.steps)
        logits = self.router(self.targets)
        pick = torch.randint(len(self.targets), (self.options.batch,), generator=self.draws)
        p = self.noise(Logits(*(axis[pick] for axis in logits)), temperature, scale)
        fraction = self.table.expected(*p) / self.table.full_ms
        above = self.surrogate.loss(p, fraction) if self.relaxed is None else self.relaxed(p) - self.full_loss
        quality = (above / self.stakes[pick]).mean()
        miss = self._latency_miss(logits, scale)
        loss = (
            quality
            + self.options.latency_weight * miss
            + self.options.nesting_weight * _falls(logits)
            + _anchor(logits)
        )
        return loss, {"quality": float(quality.detach()), "latency_miss": float(miss.detach())}

    def _latency_miss(self, logits: Logits, scale: float) -> Tensor:
        """relu(|T / (aim T_full) - 1| - 0.02), mean over the targets.

        T is that of the probabilities themselves, not of one draw: the table is linear, so this is the mean
        over all draws, without their noise.
        """
        p = Probabilities(*(torch.softmax(scale * axis, dim=-1) for axis in logits))
        # the tolerance band ends at the target: a budget is an upper bound
        aim = self.targets / (1 + TOLERANCE)
        ratio = self.table.expected(*p) / (aim * self.table.full_ms)
        miss = functional.relu((ratio - 1).abs() - TOLERANCE)
        return (miss * self.urgency).mean()

    def _report(self, ladder: Ladder, target: float) -> TargetReport:
        limit = target * self.table.full_ms
        choice = self._widths(self.router.choose(target))
        routed, uniform = (rungs.within(self.table.predict, limit) for rungs in (ladder, self.uniform))
        found = self._search(target, [uniform, routed])
        losses = predicted_losses(
            self.config, self.table, self.surrogate, [choice, routed, uniform, found]
        ).tolist()
        return TargetReport(
            target=target,
            choice_fraction=self.table.fraction(choice),
            rung_fraction=self.table.fraction(routed),
            distance=_distance(self.config, choice, routed),
            choice_loss=losses[0],
            routed_loss=losses[1],
            uniform_loss=losses[2],
            search_loss=losses[3],
            routed_observed=self._loss(routed),
            uniform_observed=self._loss(uniform),
            search_observed=self._loss(found),
            search_widths=found,
        )

    def _search(self, target: float, start: list[Widths]) -> Widths:
        return search(self.config, self.table, self.surrogate, target, start, seed=self.options.seed)


def _anchor(logits: Logits) -> Tensor:
    """Cross-entropy of the last target, which is 1, with the full model."""
    mlp, heads = (axis[-1].log_softmax(-1)[:, -1].mean() for axis in logits)
    return -(mlp + heads)


def _falls(logits: Logits) -> Tensor:
    """How much P(choice >= c) falls from a target to the next, mean over layers and choices, all axes."""
    total = torch.zeros(())
    for axis in logits:
        at_least = axis.softmax(-1).flip(-1).cumsum(-1).flip(-1)
        total = total + functional.relu(at_least[:-1] - at_least[1:]).mean()
    return total


def _distance(config: ElasticConfig, a: Widths, b: Widths) -> int:
    """Steps between two configurations, summed over layers and axes."""
    pairs = zip(chain(*config.indices(a)), chain(*config.indices(b)), strict=True)
    return sum(abs(x - y) for x, y in pairs)
