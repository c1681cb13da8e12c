"""Whole models on a GPU, checked before they are timed: python check_model.py --device cuda [CHECK ...]

Each check prints a line and fails with a sentence. On a CPU the same code runs on a tiny model, with a stand-in for the
captured graph, to show that the checks themselves work: what it says there is of no GPU.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bench_training import smollm2_shape
from gpu_contestants import forget, name_of, random_model
from torch import Tensor
from transformers import LlamaConfig

from flextron.artefacts.latency_table import Workload
from flextron.config import Widths
from flextron.judge.timing import clock_of, device_clock
from flextron.nn import Dial, ElasticCache, StaticCache, elastic_config, graph, make_elastic, rooms
from flextron.nn.router import AdaptiveRouter
from flextron.recipes import StepConfig, TrainConfig
from flextron.routing.fit import random_widths
from flextron.routing.profile import profile
from flextron.scale.memory import estimate
from flextron.training import train

WITHIN = 0.1  # of the peak that was measured, the estimate of a training step's memory must be


def shape(device: torch.device) -> LlamaConfig:
    """SmolLM2's; on a CPU a tiny one."""
    if device.type == "cuda":
        return smollm2_shape()
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)


def elastic(device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = random_model(shape(device), dtype, device)
    return make_elastic(model, elastic_config(model))


def ten(model: Any) -> list[Widths]:
    """Widths from the smallest to the full ones, others in each layer."""
    config, rng = model.elastic, random.Random(0)
    return [config.smallest(), *(random_widths(config, rng) for _ in range(8)), config.full()]


def prompt(model: Any, batch: int, length: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(model.elastic.vocab_size, (batch, length), generator=generator).to(model.device)


def generated(model: Any, ids: Tensor, new: int = 10, **options: Any) -> Tensor:
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    return model.generate(ids, max_new_tokens=new, pad_token_id=0, **settings, **options)


@contextmanager
def captures(device: torch.device) -> Iterator[list[int]]:
    """A list that grows with every captured graph; on a CPU steps count as captured, and run as Python runs them."""
    made, capture, devices = [], graph.captured, rooms.CAPTURED_ON

    def counted(*args: Any) -> Any:
        made.append(1)
        return capture(*args)

    graph.captured = counted
    if device.type == "cpu":
        rooms.CAPTURED_ON = ("cpu",)
    try:
        yield made
    finally:
        graph.captured, rooms.CAPTURED_ON = capture, devices


def adaptive(model: Any) -> Any:
    """The model with a random router that chooses for every token."""
    config, generator = model.elastic, torch.Generator().manual_seed(0)
    router = AdaptiveRouter(config.num_layers, config.hidden_size, config.choices, (0.3, 0.6, 1.0), 16)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    router.calibration = {"decode": ((0.1, 0.9), (0.0, 0.0))}
    model.attach_router(router.requires_grad_(False).to(model.device))
    return model


def tokens(device: torch.device) -> str:
    """The graph gives eager's tokens, in float32: budgets of the batch, of each request and of each token; pages."""
    model, compared = adaptive(elastic(device)), 0
    config, drawn = model.elastic, ten(model)

    def compare(what: str, ids: Tensor, dial: Dial, **cache: Any) -> None:
        nonlocal compared
        model.turn(dial)
        ours, theirs = generated(model, ids, **cache), generated(model, ids, cache=ElasticCache())
        assert torch.equal(ours, theirs), f"tokens: the graph's must be eager's, got others at {what}"
        compared += ours.numel() - ids.numel()

    with captures(device):
        for batch in (1, 5, 16) if device.type == "cuda" else (1, 5):
            ids = prompt(model, batch)
            for i, widths in enumerate(drawn):
                compare(f"batch {batch}, budget {i}", ids, Dial((widths,), ("selected", "all")[i % 2]))
            requests = Dial(tuple(drawn[i % len(drawn)] for i in range(batch)), "all")
            compare(f"batch {batch}, a budget for each request", ids, requests)
            targets = [0.3 + 0.6 * i / batch for i in range(batch)]
            compare(f"batch {batch}, adaptive", ids, Dial.adaptive(config, targets, "decode"))
            pages = StaticCache(model, batch, 64, page=16)
            compare(f"batch {batch}, pages", ids, requests, cache=pages)
    return f"{compared} tokens of the graph are eager's: static budgets, of each request, of each token; pages too"


def budgets(device: torch.device) -> str:
    """One graph serves ten budgets, and the list of them."""
    model = elastic(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    ids = prompt(model, 4)
    with captures(device) as made:
        for widths in [*ten(model), ten(model)[:4]]:
            model.set_budget(widths=widths, kv="all")
            generated(model, ids)
    assert len(made) == 1, f"budgets: one graph must serve eleven budgets, got {len(made)} captures"
    return "one captured graph served ten budgets and a list of four"


def step(device: torch.device) -> str:
    """Two steps of training, with and without recomputation: same loss, and the loss of a CPU."""
    text = torch.randint(shape(device).vocab_size, (4096,), generator=torch.Generator().manual_seed(0))
    losses: dict[str, list[float]] = {}
    for name, options in (("plain", {}), ("recomputed", {"checkpoint_activations": True})):
        config = TrainConfig(steps=2, batch_size=2, length=64, bf16=False, checkpoint_every=0, **options)
        with tempfile.TemporaryDirectory() as folder:
            losses[name] = list(train(elastic(device), text, config, folder).losses)
    first, second = losses["plain"], losses["recomputed"]
    worst = max(abs(a - b) / a for a, b in zip(first, second, strict=True))
    assert worst < 1e-4, f"step: recomputed layers must give the loss of kept ones, got {second}, not {first}"
    return f"losses of two steps: {first[0]:.4f}, {first[1]:.4f}; recomputed within {worst:.1e}"


def memory(device: torch.device) -> str:
    """The estimate of a step's memory beside the peak that torch allocated."""
    model = elastic(device)
    is_gpu = device.type == "cuda"
    config = TrainConfig(
        steps=2,
        batch_size=8 if is_gpu else 2,
        length=512 if is_gpu else 64,
        bf16=is_gpu,
        full_probability=1.0,
        checkpoint_every=0,
    )
    expected = estimate(model.elastic, StepConfig.of(config, 1, bf16=is_gpu)).total
    if not is_gpu:
        return f"estimated {expected / 1e6:.1f} MB; a CPU's peak is not measured"
    forget()
    torch.cuda.reset_peak_memory_stats(device)
    text = torch.randint(model.elastic.vocab_size, (20_000,), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        train(model, text, config, folder)
    peak = torch.cuda.max_memory_allocated(device)
    error = expected / peak - 1
    assert abs(error) < WITHIN, (
        f"memory: the estimate must be within {WITHIN:.0%}, got {expected / 1e9:.2f} GB of {peak / 1e9:.2f} GB"
    )
    return f"estimated {expected / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB: {error:+.1%}"


def reads(device: torch.device) -> str:
    """How often the host waits for the device in a step of training with a teacher: once."""
    if device.type != "cuda":
        return "a CPU is not waited for; tests/training/test_loop.py counts what is read"
    text = torch.randint(shape(device).vocab_size, (4096,), generator=torch.Generator().manual_seed(0))
    waits = []
    for steps in (2, 6):  # what a run does besides its steps is in both
        config = TrainConfig(steps=steps, batch_size=2, length=64, distillation=1.0, checkpoint_every=0)
        teacher = elastic(device).eval()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train(elastic(device), text, config, folder, teacher=teacher)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(w.message) for w in told))
    each = (waits[1] - waits[0]) / 4
    assert each <= 1, f"reads: the host must wait for the device once a step, got {each:g} times"
    return f"the host waits for the device {each:g} times a step"


def table(device: torch.device) -> str:
    """A latency table of each phase, by the device's clock."""
    is_gpu = device.type == "cuda"
    assert (clock_of(device) is device_clock) == is_gpu, "table: a GPU must be timed by its events"
    model = elastic(device, torch.bfloat16 if is_gpu else torch.float32)
    found = []
    n = 512 if is_gpu else 32
    for workload in (Workload.prefill(n), Workload.decode(n), Workload.decode(n, batch=16)):
        made = profile(
            model, workload, rounds=2, min_seconds=0.005 if is_gpu else 0, fit=4, held_out=3, patience=0
        )
        found.append(
            f"{workload}: {made.smallest_ms:.3f} .. {made.full_ms:.3f} ms, error {100 * made.residual_worst:.0f} %"
        )
    return f"{made.machine_name}; " + "; ".join(found)


CHECKS: dict[str, Callable[[torch.device], str]] = {
    f.__name__: f for f in (tokens, budgets, step, memory, reads, table)
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checks", nargs="*", metavar="CHECK", help=f"some of {', '.join(CHECKS)}; all by default"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    args = parser.parse_args()
    if unknown := [name for name in args.checks if name not in CHECKS]:
        parser.error(f"CHECK must be one of {', '.join(CHECKS)}, got {unknown[0]}")
    failed = 0
    for name in args.checks or CHECKS:
        begin = time.perf_counter()
        try:
            said = CHECKS[name](args.device)
        except AssertionError as error:
            failed, said = 1, f"FAILED, {error}"
        forget()
        print(f"{name}, {time.perf_counter() - begin:.1f} s on {name_of(args.device)}: {said}", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
