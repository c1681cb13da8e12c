"""Elastic continued training: sampler, loop, checkpoints of a run."""

from flextron.training.loop import TrainReport, train
from flextron.training.optimizer import learning_rate
from flextron.training.sampler import WidthSampler, homogeneous
from flextron.training.sharding import bf16_is_fast

__all__ = [
    "TrainReport",
    "WidthSampler",
    "bf16_is_fast",
    "homogeneous",
    "learning_rate",
    "train",
]
