"""A model that exists only as numbers: menus, a latency table, and a loss with a known best answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from flextron.artefacts.directory import ElasticDirectory
from flextron.artefacts.latency_table import LatencyTable, Workload
from flextron.artefacts.planner import Planner
from flextron.checkpoint import Origin
from flextron.config import Counts, ElasticConfig, Widths
from flextron.routing.fit import calibration_widths


def make_config(layers: int = 12, mlp_choices=(16, 32, 48, 64), head_choices=(1, 2, 3)) -> ElasticConfig:
    return ElasticConfig(
        family="llama",
        unit="kv_group",
        num_layers=layers,
        hidden_size=32,
        intermediate_size=mlp_choices[-1],
        num_heads=2 * head_choices[-1],
        num_kv_heads=head_choices[-1],
        head_dim=8,
        vocab_size=100,
        tied=True,
        qk_norm=False,
        counts=Counts.of_llama(layers, 32, 8, 100, tied=True),
        mlp_choices=mlp_choices,
        head_choices=head_choices,
    )


def make_origin(config: ElasticConfig, weights: str = "ab" * 32) -> Origin:
    """What files of a checkpoint with these weights say they were made for."""
    return Origin(config, weights)


def make_table(
    config: ElasticConfig, phase: str = "prefill", base: float = 2.0, slope: float = 1.1
) -> LatencyTable:
    """A neuron costs 0.01 ms and a head unit 0.2 ms in every layer, before the slope."""
    mlp = (tuple(0.01 * d + 0.05 for d in config.mlp_choices),) * config.num_layers
    heads = (tuple(0.2 * n + 0.1 for n in config.head_choices),) * config.num_layers
    return LatencyTable(
        workload=Workload.prefill(128) if phase == "prefill" else Workload.decode(64),
        machine={"device": "paper", "threads": 2},
        elastic=config,
        mlp=mlp,
        heads=heads,
        raw_mlp=mlp,
        raw_heads=heads,
        base=base,
        slope=slope,
    )


def planner_in(directory: Path, origin: Origin) -> Planner:
    """The planner of a directory that holds tables and routers, but no model: ``origin`` stands for it."""
    with ElasticDirectory.open(directory) as checkpoint:
        checkpoint.origin, checkpoint.meta = origin, {}
        return checkpoint.planner()


def measured(table: LatencyTable, fraction_noise: float, seed: int = 0) -> tuple[list, list]:
    """Times, to fit on and to judge by, of a machine whose base is 5 and slope 0.8, instead of the draft's."""
    machine = replace(table, base=5.0, slope=0.8)
    rng = random.Random(seed)
    to_fit, to_judge = calibration_widths(table.elastic, 10, 6, seed=3)
    noisy = [
        [(w, machine.predict(w) * (1 + fraction_noise * rng.gauss(0, 1))) for w in ws]
        for ws in (to_fit, to_judge)
    ]
    return noisy[0], noisy[1]


@dataclass
class SyntheticLoss:
    """3 + damage: every layer has its own sensitivity, and neighbours that are both narrow hurt twice.

    Sensitivities span a factor of about twenty, so which layers are cut matters far more than how many.
    """

    config: ElasticConfig
    interaction: float = 0.3
    seed: int = 0
    calls: int = 0

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        layers = self.config.num_layers
        self.sensitivity = {
            axis: [0.6 / layers * 20 ** (rng.random() - 0.5) for _ in range(layers)]
            for axis in ("mlp", "heads")
        }

    def __call__(self, widths: Widths) -> float:
        self.calls += 1
        lost = [1 - d / self.config.mlp_choices[-1] for d in widths.mlp]
        gone = [1 - n / self.config.head_choices[-1] for n in widths.heads]
        damage = sum(s * x**1.5 for s, x in zip(self.sensitivity["mlp"], lost, strict=True))
        damage += sum(s * x**1.5 for s, x in zip(self.sensitivity["heads"], gone, strict=True))
        pairs = sum(a * b for a, b in pairwise(lost)) / len(lost)
        mixed = sum(a * b for a, b in zip(lost, gone, strict=True)) / len(lost)
        return 3.0 + damage + self.interaction * (pairs + mixed) + 0.5 * damage**2
