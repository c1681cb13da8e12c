"""Elastic continued training, joint tuning with routers: sampler, losses, loop, evaluation."""

from flextron.train.loop import TrainConfig, TrainReport, bf16_is_fast, learning_rate, train
from flextron.train.losses import cross_entropy, distillation
from flextron.train.metrics import evaluate, perplexity
from flextron.train.sampler import WidthSampler, homogeneous
from flextron.train.tune import TuneConfig, tune

__all__ = [
    "TrainConfig",
    "TrainReport",
    "TuneConfig",
    "WidthSampler",
    "bf16_is_fast",
    "cross_entropy",
    "distillation",
    "evaluate",
    "homogeneous",
    "learning_rate",
    "perplexity",
    "train",
    "tune",
]
