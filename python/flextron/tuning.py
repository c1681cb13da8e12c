"""Joint tuning: model and router learn through each other; no surrogate stands between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flextron.data import Tokens, seeded
from flextron.nn.protocol import Elastic
from flextron.nn.router import AdaptiveRouter, GumbelSampler, StaticRouter
from flextron.recipes import TuneConfig
from flextron.routing.learning import Fraction, latency_miss, learning_policy, mean_choices
from flextron.training.loop import Progress, Run, TrainReport, check_model, check_teacher, run_to_the_end
from flextron.training.teacher import Told

# temperature and scale of the logits: sharper than at the start of a router's training, but not decided
_SHARPNESS = (0.3, 3.0)


class _SequenceNoise(GumbelSampler):
    """Noise that each sequence draws from a generator of its own, whichever process it is on."""

    def __init__(self, seed: int, sequences: Sequence[int]) -> None:
        self.generators = [seeded(f"noise/{seed}/{n}") for n in sequences]

    def clone(self) -> _SequenceNoise:
        other = _SequenceNoise(0, ())
        other.generators = [generator.clone_state() for generator in self.generators]
        return other

    def _exponential(self, shape: torch.Size) -> Tensor:
        one = (shape[0] // len(self.generators), *shape[1:])
        return torch.cat([torch.empty(one).exponential_(generator=g) for g in self.generators])


def tune(
    model: Elastic,
    router: StaticRouter | AdaptiveRouter,
    fraction: Fraction,
    tokens: Tokens,
    config: TuneConfig,
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
    """Train an elastic model and its router together, in place; a killed run resumes as `train`'s does.

    A micro-batch runs the full model with ``config.full_probability``; otherwise every sequence draws a trained
    target below 1 and the router's noisy choices are the sub-network. Loss: that of `train`, and the latency term.

    Args:
        model: elastic, with float32 weights.
        router: on the model's device; its last trained target is the full model.
        fraction: share of the full latency of choice probabilities: ``table.expected(*p) / table.full_ms``.
        tokens, config, directory, teacher, resume, progress, validation, begun, starting, cached: what `train` takes.
    """
    check_model(model)
    check_teacher(model, teacher, config)
    router.requires_grad_(True)
    try:
        run = _Tuning(model, tokens, config, Path(directory), teacher, validation, router, fraction)
        return run_to_the_end(run, resume, progress, begun, starting, cached)
    finally:
        router.requires_grad_(False)


class _Tuning(Run):
    """The moving parts of one call of `tune`."""

    config: TuneConfig

    def __init__(
        self,
        model: Elastic,
        tokens: Tokens,
        config: TuneConfig,
        directory: Path,
        teacher: nn.Module | None,
        validation: Tensor | None,
        router: StaticRouter | AdaptiveRouter,
        fraction: Fraction,
    ) -> None:
        self.router, self.fraction = router, fraction
        self.draws = seeded(f"targets/{config.seed}")
        super().__init__(model, tokens, config, directory, teacher, validation)
        named = [(f"router.{name}", p) for name, p in router.named_parameters()]
        self.names += [name for name, _ in named]
        # not among self.parameters: the model's gradient is clipped by its own norm
        self.optimizer.add_param_group(
            {"params": [p for _, p in named], "weight_decay": 0.0, "rate": config.router_rate}
        )

    def _accumulate(self) -> tuple[dict[str, Tensor], float]:
        found = super()._accumulate()
        self.spread.reduce(self.router.parameters())
        return found

    def _micro_batch(self, batch: Tensor) -> tuple[dict[str, Tensor], float]:
        c = self.config
        if float(torch.rand((), dtype=torch.float64, generator=self.draws)) < c.full_probability:
            self.model.set_widths(self.model.elastic.full())
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                return self._losses(batch), 1.0
        below = torch.tensor(self.router.targets[:-1])
        targets = below[torch.randint(len(below), (c.batch_size,), generator=self.draws)].to(self.device)
        tau = targets[self.spread.part]
        policy = learning_policy(self.model, self.router, tau, self._noise(), *_SHARPNESS, c.gates)
        self.model.set_policy(policy, self.model.elastic.full(), "all")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            terms = self._losses(batch)
        spent = self.spread.whole(self.fraction(mean_choices(policy, len(batch))))
        miss = latency_miss(spent, targets)
        terms |= {"loss": terms["loss"] + c.latency_weight * miss, "latency_miss": miss}
        return terms, float(spent.detach().mean())

    def _noise(self) -> _SequenceNoise:
        """The noise of the sequences that were drawn last."""
        first = self.batches.state_dict()["drawn"] - self.config.batch_size
        return _SequenceNoise(self.config.seed, [first + row for row in self.batches.rows])

    def _flops(self) -> float:
        hard = self.config.gates == "hard" and self.model.settings.now().policy is not None
        return math.nan if hard else super()._flops()  # hard: what each token chose is on the device

    def _smallest(self) -> float:
        return 0.0  # shares of the full latency

    def _more_tensors(self) -> dict[str, Tensor]:
        state = {f"router.{name}": value for name, value in self.router.state_dict().items()}
        return state | {"targets": self.draws.get_state()}

    def _load_more(self, tensors: Mapping[str, Tensor]) -> None:
        state = {name.removeprefix("router."): t for name, t in tensors.items() if name.startswith("router.")}
        self.router.load_state_dict(state)
        self.draws.set_state(tensors["targets"])

    def _identity(self, tokens: Tokens) -> dict[str, Any]:
        router = {"class": type(self.router).__name__, "targets": list(self.router.targets)}
        return super()._identity(tokens) | {"router": router}
