"""Elastic continued training, joint tuning with routers: sampler, losses, loop, evaluation."""

from flextron.training.loop import TrainConfig, TrainReport, bf16_is_fast, learning_rate, train
from flextron.training.losses import cross_entropy, distillation
from flextron.training.metrics import evaluate, perplexity
from flextron.training.sampler import WidthSampler, homogeneous
from flextron.training.tune import TuneConfig, tune

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
