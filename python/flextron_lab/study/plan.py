"""What the study trains, on how many tokens, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from flextron.artefacts.latency_table import Workload
from flextron.config import Widths
from flextron.recipes import AdaptiveConfig, RouteConfig, TrainConfig


@dataclass(frozen=True)
class Arm:
    """One way to make a sub-network.

    Attributes:
        order: how neurons and heads are sorted when the parent is converted.
        options: fields of `TrainConfig` that differ from the plan's.
        start: ``"parent"`` continues from the parent's weights, ``"scratch"`` from random ones.
        alone: budget whose uniform sub-network is trained alone; None trains all widths elastically.
    """

    order: str = "importance"
    options: dict[str, Any] = field(default_factory=dict)
    start: str = "parent"
    alone: float | None = None


@dataclass(frozen=True)
class Plan:
    """How much work each stage does for one parent, so that two cores need about an hour.

    Attributes:
        parent: a name that `flextron_lab.demo.parents.load_parent` knows.
        pretraining_tokens: number of tokens that the parent was trained on; None where it is not known.
        workload: the forward whose latency budgets are fractions of.
        budgets: fractions of the full model's latency.
        alone: those budgets at which models are also trained alone.
        train: the main arm's training; the study's seed replaces its own.
        route: training of the static routers; the study's seed replaces its own.
        end_to_end: fields of ``route`` that differ for routers that learn through the model instead of the surrogate.
        adaptive: training of the routers that choose for every token; the study's seed replaces its own.
        adaptive_length: tokens in each sequence that adaptive routers learn from.
        route_samples: number of sequences behind one loss that the surrogate learns from.
        length: tokens in every sequence that is judged, routed or scored on.
        judged: number of held-out sequences.
        calibration: number of sequences that importance is scored on.
    """

    parent: str
    pretraining_tokens: float | None
    workload: Workload
    budgets: tuple[float, ...]
    alone: tuple[float, ...]
    train: TrainConfig
    route: RouteConfig
    end_to_end: dict[str, Any]
    adaptive: AdaptiveConfig
    adaptive_length: int
    route_samples: int
    length: int
    judged: int
    calibration: int

    def arms(self) -> dict[str, Arm]:
        """Every training run of one seed, by name."""
        cross_entropy = {"cross_entropy": 1.0, "distillation": 0.0}
        arms = {
            "importance order": Arm(),
            "no order": Arm(order="none"),
            "random order": Arm(order="random"),
            "cross-entropy": Arm(options=cross_entropy),
            # Not by distillation: at full width student and teacher are the same, and nothing would be learnt.
            "full width only": Arm(options=cross_entropy | {"full_probability": 1.0}),
        }
        for budget in self.alone:
            arms[f"alone from slice at {budget:g}"] = Arm(alone=budget)
            arms[f"alone from scratch at {budget:g}"] = Arm(start="scratch", alone=budget)
        return arms

    def training(self, arm: Arm, seed: int, widths: Widths | None) -> TrainConfig:
        """The configuration of an arm's run; ``widths`` is the sub-network that is trained alone, if one is."""
        alone: dict[str, Any] = {"networks": (widths,), "full_probability": 0.0} if widths else {}
        return replace(self.train, seed=seed, **arm.options, **alone)


_TRAIN = TrainConfig(
    steps=100,
    batch_size=8,
    length=256,
    learning_rate=1e-3,
    cross_entropy=0.0,
    distillation=1.0,
    weight_decay=0.0,
    eval_every=0,
    checkpoint_every=0,
)
_END_TO_END = {"form": "gumbel", "steps": 300, "batch": 8}  # each step costs a training step of the model
_BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9)

PLANS = {
    # 100,000 steps of 128 sequences of 512 tokens: doc/stories260K.md of karpathy/llama2.c.
    "stories260k": Plan(
        parent="stories260k",
        pretraining_tokens=100_000 * 128 * 512,
        workload=Workload.prefill(256, batch=16),
        budgets=_BUDGETS,
        alone=(0.5, 0.7),
        train=_TRAIN,
        route=RouteConfig(targets=(*_BUDGETS, 1.0), evaluations=300, prefill=200, steps=1000),
        end_to_end=_END_TO_END,
        adaptive=AdaptiveConfig(targets=(*_BUDGETS, 1.0), steps=150),
        adaptive_length=128,
        route_samples=4,
        length=256,
        judged=32,
        calibration=64,
    ),
    "stories15m": Plan(
        parent="stories15m",
        pretraining_tokens=None,
        workload=Workload.prefill(256),
        budgets=_BUDGETS,
        alone=(0.5,),
        train=replace(_TRAIN, steps=30, batch_size=4, length=256, learning_rate=3e-4),
        route=RouteConfig(targets=(*_BUDGETS, 1.0), evaluations=260, prefill=180),
        end_to_end=_END_TO_END | {"steps": 100, "batch": 4},
        adaptive=AdaptiveConfig(targets=(*_BUDGETS, 1.0), steps=100, batch=4),
        adaptive_length=128,
        route_samples=2,
        length=256,
        judged=8,
        calibration=16,
    ),
}
