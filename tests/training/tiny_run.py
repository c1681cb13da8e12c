"""A tiny training run, for the tests; as a script it runs in a process that can be killed where one wants.

    python tiny_run.py run DIR [DIR ...]        runs, or resumes, the run in each folder to its end
    python tiny_run.py stop-after-step N DIR    waits for ever after step N
    python tiny_run.py stop-before-file NAME DIR   waits for ever before NAME of a checkpoint gets its place

Before it waits it prints "waiting".
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from flextron.nn import elastic_config, make_elastic
from flextron.recipes import TrainConfig
from flextron.training import train

VOCAB = 41
CONFIG = TrainConfig(
    steps=12,
    batch_size=2,
    length=12,
    accumulation=2,
    learning_rate=3e-3,
    warmup=0.25,
    distillation=0.5,
    bf16=False,
    eval_every=5,
    checkpoint_every=3,
)


def parent(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama of two layers with four query heads in two groups and 24 neurons."""
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()


def elastic(unit: str = "kv_group", seed: int = 0, **overrides: Any) -> Any:
    model = parent(seed, **overrides)
    return make_elastic(model, elastic_config(model, unit, mlp_choices=(8, 16, 24)))


def tokens(count: int = 700) -> torch.Tensor:
    """A stream that can be learnt: each token mostly says which comes next."""
    generator = torch.Generator().manual_seed(9)
    steps = torch.where(torch.rand(count, generator=generator) < 0.9, 7, 3)
    return steps.cumsum(0) % VOCAB


def run(directory: str | Path, progress: Any = None) -> Any:
    """Train with a teacher and with dropout, so that every generator there is matters."""
    torch.set_num_threads(1)
    model = elastic()
    model.model.embed_tokens.register_forward_hook(lambda module, _, x: F.dropout(x, 0.1, module.training))
    validation = tokens(48).view(4, 12)
    train(model, tokens(), CONFIG, directory, teacher=parent(1), progress=progress, validation=validation)
    return model


def wait_for(directory: str, step: int) -> None:
    """Wait for ever after a step, once its last checkpoint, which is written in the background, is there."""
    last = step // CONFIG.checkpoint_every * CONFIG.checkpoint_every
    while not (Path(directory) / f"step-{last:08d}.json").exists():
        time.sleep(0.01)
    wait()


def wait() -> None:
    print("waiting", flush=True)
    time.sleep(600)


def main(command: str, *arguments: str) -> None:
    if command == "run":
        for directory in arguments:
            run(directory)
    elif command == "stop-after-step":
        last, directory = arguments
        run(directory, lambda step, steps, record: step == int(last) and wait_for(directory, step))
    elif command == "stop-before-file":
        name, directory = arguments
        replace = os.replace

        def replace_or_wait(source: Any, target: Any) -> None:
            if Path(target).name == name:
                wait()
            replace(source, target)

        os.replace = replace_or_wait
        run(directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
