"""Elastic continued training, joint tuning with routers: sampler, loop, checkpoints of a run."""

from flextron.training.loop import TrainConfig, TrainReport, bf16_is_fast, learning_rate, train
from flextron.training.sampler import WidthSampler, homogeneous
from flextron.training.tune import TuneConfig, tune

__all__ = [
    "TrainConfig",
    "TrainReport",
    "TuneConfig",
    "WidthSampler",
    "bf16_is_fast",
    "homogeneous",
    "learning_rate",
    "train",
    "tune",
]
