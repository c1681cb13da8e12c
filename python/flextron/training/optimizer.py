"""What is trained, and how a step moves it: AdamW, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from flextron.nn.protocol import Elastic
from flextron.recipes import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 1, 2 .. ``steps``: linear warm-up, then half a cosine down to ``min_lr_ratio``."""
    warm = round(config.warmup * config.steps)
    if step <= warm:
        return config.learning_rate * step / warm
    progress = (step - warm) / (config.steps - warm)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def trained(model: Elastic) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained: matrices, then vectors."""
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return sorted(found, key=lambda member: member[1].dim() < 2)  # stable


def adamw(model: Elastic, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW of the `trained` parameters, in their order.

    Matrices decay, embeddings among them, vectors (norms, biases) do not: the habit of GPT-3 and Megatron-LM.
    """
    found = [p for _, p in trained(model)]
    matrices = {"params": [p for p in found if p.dim() >= 2], "weight_decay": config.weight_decay}
    vectors = {"params": [p for p in found if p.dim() < 2], "weight_decay": 0.0}
    return torch.optim.AdamW((matrices, vectors), config.learning_rate, config.betas, fused=True)
