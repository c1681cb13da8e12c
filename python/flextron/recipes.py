"""How to train, tune and route: frozen settings whose fields say what they do. No torch here.

The command line makes its options from these fields, so a default and its explanation stand here and nowhere else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from flextron.config import Widths, check_numbers, check_targets, number

GATES = ("soft", "hard")
ROUTE_FORMS = ("surrogate", "gumbel", "search", "steps")
ADAPTIVE_FORMS = ("gumbel", "surrogate")
SHARDS = ("none", "full", "hybrid")
TEACHERS = ("none", "whole", "sharded", "cached")
REPORTED = 3  # evaluations that a report takes at each target below 1: routed, uniform, searched
JUDGING = 6  # every sixth observation of an adaptive router judges its surrogate, which is not trained on it

# what fields of several recipes say
_STEPS = "optimiser steps in all; a finished run that is given more goes on from its end, at the longer run's rates"
_TARGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_TARGETS_ARE = (
    "latency targets to train, as fractions of the full model's, ascending to 1; those that no network is fast enough "
    "for are left out"
)
_FORM = (
    "loss that a router learns from: what a surrogate predicts (surrogate), the model's own, end to end through its "
    "gates (gumbel), or none, when static routers only imitate what search finds on the surrogate (search), or what "
    "measured steps from the full model find (steps)"
)
_PREFILL = "random configurations whose loss the surrogate learns before a router moves"


def about(
    default: Any,
    text: str,
    *,
    least: int | None = None,
    positive: bool = False,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field with its default, what it does, and the values that it may have."""
    metadata = {"text": text, "least": least, "positive": positive, "choices": choices}
    return field(default=default, metadata=metadata)


def _check(config: Any) -> None:
    """Raise ValueError unless every field has a value that `about` allows."""
    check_numbers(config)
    for f in fields(config):
        value, allowed = getattr(config, f.name), f.metadata
        if allowed["choices"] and value not in allowed["choices"]:
            _refuse(config, f.name, f"be one of {', '.join(allowed['choices'])}", repr(value))
        if value is None:
            continue
        if allowed["least"] is not None and value < allowed["least"]:
            _refuse(config, f.name, f"be at least {allowed['least']}")
        if allowed["positive"] and value <= 0:
            _refuse(config, f.name, "be positive")


def _refuse(config: Any, name: str, requirement: str, got: Any = None) -> None:
    value = getattr(config, name) if got is None else got
    raise ValueError(f"{type(config).__name__}: {name} must {requirement}, got {value}")


@dataclass(frozen=True)
class TrainConfig:
    """How to train an elastic model."""

    steps: int = about(1000, _STEPS, least=1)
    batch_size: int = about(8, "sequences in a micro-batch", least=1)
    length: int = about(512, "tokens in a training sequence", least=2)
    accumulation: int = about(1, "micro-batches in a step, each with a sub-network of its own", least=1)
    learning_rate: float = about(1e-4, "the model's learning rate at its peak")
    warmup: float = about(0.05, "share of the steps over which the learning rate rises linearly")
    min_lr_ratio: float = about(0.1, "last learning rate as a share of the peak, which falls by a cosine")
    weight_decay: float = about(
        0.1, "decoupled weight decay of matrices, embeddings included; norms and biases have none", least=0
    )
    betas: tuple[float, float] = about((0.9, 0.95), "AdamW's two decay rates")
    clip: float | None = about(
        1.0, "norm to which the gradient is clipped; None leaves the gradient as it is"
    )
    cross_entropy: float = about(1.0, "weight of the next-token loss", least=0)
    distillation: float = about(
        0.0,
        "weight of the KL divergence from the teacher: the checkpoint as it was when the run began",
        least=0,
    )
    teacher_logits: int = about(
        0,
        "how many of the teacher's logits to keep of each token, the largest, on the disk: computed once before the "
        "first step, instead of in every step; all others count as one; 0: the teacher itself runs in every step",
        least=0,
    )
    temperature: float = about(1.0, "temperature at which teacher and student are compared")
    bf16: bool | None = about(
        None, "whether to autocast to bfloat16; by default where the device computes it fast"
    )
    checkpoint_activations: bool = about(
        False,
        "keep each layer's input alone and run the layer again in the backward pass: less memory, a third more work",
    )
    eval_every: int = about(
        100,
        "steps between evaluations, with one before the first step and one after the last; 0: none",
        least=0,
    )
    eval_widths: tuple[Widths, ...] = about(
        (),
        "sub-networks to evaluate; by default those of networks and the full one, or the smallest, the middle and the "
        "full uniform one",
    )
    checkpoint_every: int = about(
        100, "steps between checkpoints, with one after the last; 0: none at all", least=0
    )
    full_probability: float = about(0.3, "probability that a micro-batch trains the full model")
    networks: tuple[Widths, ...] = about(
        (),
        "sub-networks to draw below the full one, each in proportion to the parameters that it does without; by "
        "default whatever the menus allow",
    )
    shard: str = about(
        "auto",
        "who holds weights, gradients and optimiser states: every process all (none), each its part (full), each its "
        "part of the node's (hybrid); auto: none where that fits, else full",
        choices=("auto", *SHARDS),
    )
    widths_per_rank: bool = about(False, "draw a sub-network for each process, not one for all")
    seed: int = about(0, "seed of the data order, of the sub-networks drawn and of torch")

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "betas", tuple(number("TrainConfig: betas", b) for b in self.betas))
        for name in ("eval_widths", "networks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("warmup", "min_lr_ratio", "full_probability"):
            if not 0 <= getattr(self, name) <= 1:
                _refuse(self, name, "lie in [0, 1]")
        for name in ("learning_rate", "temperature"):
            if getattr(self, name) <= 0:
                _refuse(self, name, "be above 0")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            _refuse(self, "betas", "be two in [0, 1)")
        if self.clip is not None and self.clip <= 0:
            _refuse(self, "clip", "be above 0, or None")
        if self.teacher_logits and not self.distillation:
            _refuse(self, "teacher_logits", "be 0 without distillation")
        if not self.cross_entropy + self.distillation > 0:
            raise ValueError(
                "TrainConfig: one of cross_entropy and distillation must be above 0, got 0 and 0"
            )


@dataclass(frozen=True)
class TuneConfig(TrainConfig):
    """How to tune a model and its router jointly; the other fields are `TrainConfig`'s."""

    steps: int = about(200, _STEPS, least=1)
    router_rate: float = about(30.0, "the router's learning rate, as a multiple of the model's", least=0)
    gates: str = about(
        "hard",
        "how a layer mixes its widths while the router learns: hard gates run each token (static router: each "
        "sequence) at its own choice alone, with straight-through gradients; soft gates mix all widths, at the cost of "
        "the widest",
        choices=GATES,
    )
    latency_weight: float = about(
        5.0,
        "weight of the relative distance from the latency target, beyond a tolerance of 2 %; the latency is the mean "
        "over a target's tokens",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.widths_per_rank:
            _refuse(self, "widths_per_rank", "be False, for each sequence has a sub-network of its own")


@dataclass(frozen=True)
class RouteConfig:
    """How to train static routers, which choose once for every target.

    The surrogate judges and is judged in every form, whichever loss the routers learn from.
    """

    form: str = about("surrogate", _FORM, choices=ROUTE_FORMS)
    targets: tuple[float, ...] = about(_TARGETS, _TARGETS_ARE)
    evaluations: int = about(700, "evaluations of the model's loss in all", least=1)
    prefill: int = about(500, _PREFILL, least=8)
    held_out: float = about(
        0.15, "share of the random configurations that judge the surrogate, which is not trained on them"
    )
    threshold: float = about(
        0.02,
        "nats; routers move while the moving average of the surrogate's absolute error is below it",
        positive=True,
    )
    patience: float = about(
        0.5,
        "share of the evaluations after the prefill that may be spent waiting for the threshold; afterwards the "
        "routers move all the same, and the result says how many steps they moved so",
    )
    steps: int = about(1500, "steps that a router takes", positive=True)
    lr: float = about(1e-2, "the routers' learning rate", positive=True)
    hidden: int = about(256, "width of a router's hidden layer", positive=True)
    surrogate_hidden: int = about(256, "width of the surrogate's hidden layers", positive=True)
    batch: int = about(16, "targets drawn for one step", positive=True)
    latency_weight: float = about(
        5.0,
        "weight of relu(|T / (aim T_full) - 1| - 0.02) / (1 - target), where aim = target / 1.02: close to the full "
        "model, a little more latency buys a larger share of what is left to gain",
    )
    nesting_weight: float = about(
        1.0,
        "weight of how far a layer's expected choice falls from one target to the next; without it the ladder would "
        "have to correct such falls",
    )
    surrogate_steps: int = about(
        600, "steps of the surrogate's first fit; a later fit takes a twentieth as many", positive=True
    )
    seed: int = about(0, "seed of every random draw")

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "targets", check_targets("RouteConfig", self.targets, to_full=True))
        needed = self.prefill + 1 + REPORTED * (len(self.targets) - 1)
        if self.form != "steps" and self.evaluations < needed:
            raise ValueError(
                f"RouteConfig: evaluations must be at least {needed} (the prefill, the full model, "
                f"{REPORTED} for each target at the end), got {self.evaluations}"
            )
        for name, low, high in (("held_out", 1 / self.prefill, 0.5), ("patience", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                _refuse(self, name, f"be within [{low}, {high}]")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class AdaptiveConfig:
    """How to train an adaptive router, which chooses for every token.

    Its surrogate predicts from the shares of tokens that make each choice. That takes no backward pass, and teaches how
    much of each layer a target is best spent on, but not for which tokens.
    """

    form: str = about("gumbel", _FORM, choices=ADAPTIVE_FORMS)
    targets: tuple[float, ...] = about(_TARGETS, _TARGETS_ARE)
    gates: str = about(
        "soft",
        "how a layer mixes its widths while the router learns: soft gates mix all widths, at the cost of the widest; "
        "hard gates run each token at its own choice alone, with straight-through gradients",
        choices=GATES,
    )
    steps: int = about(400, "steps that a router takes", positive=True)
    lr: float = about(3e-3, "the router's learning rate", positive=True)
    hidden: int | None = about(
        None, "width of the router's hidden layer; None: as `default_hidden` says", positive=True
    )
    batch: int = about(8, "sequences in a step, each with a target of its own", positive=True)
    latency_weight: float = about(
        5.0,
        "weight of relu(|T / (target T_full) - 1| - 0.02), where T is the mean over a target's tokens",
        least=0,
    )
    prefill: int = about(200, _PREFILL, least=2 * JUDGING)
    threshold: float = about(
        0.02,
        "nats; the router moves while the moving average of the surrogate's absolute error is below it",
        positive=True,
    )
    patience: float = about(
        0.5,
        "observations, as a share of the steps, that may be spent waiting for the threshold; afterwards the router "
        "moves all the same, and the result says how many steps it moved so",
        least=0,
    )
    calibration: int = about(
        8, "training sequences on which offsets are calibrated to fractions of the latency", positive=True
    )
    judged: int = about(
        8, "sequences that are kept from training and calibration, for the report", positive=True
    )
    seed: int = about(0, "seed of every random draw")

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "targets", check_targets("AdaptiveConfig", self.targets, to_full=True))
        if self.form == "surrogate" and self.gates != "soft":
            _refuse(self, "gates", "be soft with the form surrogate", repr(self.gates))


@dataclass(frozen=True)
class StepConfig:
    """What decides how much memory, traffic and time a training step takes on each GPU."""

    rows: int = about(1, "sequences in a GPU's micro-batch", least=1)
    length: int = about(4096, "tokens in a training sequence", least=2)
    accumulation: int = about(1, "micro-batches in a step", least=1)
    bf16: bool = about(True, "whether to autocast to bfloat16")
    checkpoint_activations: bool = about(False, "keep each layer's input alone and run the layer again")
    shard: str = about(
        "none",
        "who holds weights, gradients and optimiser states: every GPU all (none), each its part (full), each its part "
        "of the node's (hybrid)",
        choices=SHARDS,
    )
    node: int = about(8, "GPUs in a node", least=1)
    teacher: str = about(
        "none",
        "teacher of a distillation: on every GPU, sharded, or its logits from a cache",
        choices=TEACHERS,
    )
    teacher_value: int = about(4, "bytes of one of the teacher's weights", least=1)
    cpu: bool = about(False, "whether the device is a CPU, whose loss makes its logits a few rows at a time")

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def of(cls, config: TrainConfig, ranks: int, **facts: Any) -> StepConfig:
        """The step of a run on so many ranks; facts are the fields that its configuration does not decide."""
        shared = {
            name: getattr(config, name) for name in ("length", "accumulation", "checkpoint_activations")
        }
        teacher = "cached" if config.teacher_logits else "whole" if config.distillation else "none"
        return cls(**{"rows": -(-config.batch_size // ranks), "teacher": teacher, **shared, **facts})

    def shards(self, ranks: int) -> int:
        """How many ranks share one copy of the weights."""
        return {"none": 1, "full": ranks, "hybrid": min(self.node, ranks)}[self.shard]
