"""Training: what a step takes at several widths, tokens per second and where they go, and two processes at once.

python bench_training.py              a step at several widths, as a share of the full one
python bench_training.py tokens       tokens per second of `flextron.training.train`, and what a step spends its time on
python bench_training.py contention   what two trainings on the same processors lose to each other
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from flextron.artefacts.machine import machine_of
from flextron.cli.threads import SPINS
from flextron.config import ElasticConfig, Widths
from flextron.judge.objectives import cross_entropy
from flextron.judge.timing import compare, wait_until_idle
from flextron.nn import elastic_config, make_elastic
from flextron.recipes import TrainConfig
from flextron.training import train

WARM = 4  # steps before memory that is kept from step to step has been touched
# What an operation of torch's profiler belongs to, by how its name begins; the first that fits.
DIVISION = {
    "teacher": ("flextron::decoder_step",),
    "attention": ("flextron::head_attention",),
    "products of the layers": ("flextron::elastic_",),
    "products of the head": ("aten::mm", "aten::addmm"),
    "AdamW and norms of gradients": ("aten::_fused_adam", "aten::linalg_vector_norm"),
    "casts and copies": ("aten::copy_",),
    "zeros": ("aten::fill_", "aten::zero_"),
    "softmax": ("aten::_softmax", "aten::_log_softmax", "aten::amax"),
}


def smollm2_shape() -> LlamaConfig:
    """The shape of SmolLM2-135M; the weights are random, which costs the same time."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def toy_shape() -> LlamaConfig:
    """The shape of stories260K."""
    return LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )


def elastic(shape: LlamaConfig) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape)
    half = shape.intermediate_size // 2
    return make_elastic(model, elastic_config(model, mlp_choices=(half, shape.intermediate_size)))


def halved(c: ElasticConfig) -> Widths:
    """Half the neurons, and half the groups, over all layers."""
    G = c.num_kv_heads
    return Widths(
        (c.intermediate_size // 2,) * c.num_layers,
        tuple(G // 2 + (i % 2 if G % 2 else 0) for i in range(c.num_layers)),
    )


# ---- a step at several widths


def widths(args: argparse.Namespace) -> None:
    model = elastic(smollm2_shape())
    c, layers = model.elastic, model.elastic.num_layers
    ids = torch.randint(c.vocab_size, (args.batch_size, args.length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    half = c.intermediate_size // 2
    named = {
        "full": c.full(),
        "half the neurons, 2 of 3 groups": Widths((half,) * layers, (2,) * layers),
        "half the neurons, half the groups": halved(c),
        "half the neurons, 1 of 3 groups": Widths((half,) * layers, (1,) * layers),
    }

    def step() -> None:
        cross_entropy(model(input_ids=ids, use_cache=False).logits, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    full, others = compare(
        ("full", step),
        {name: step for name in list(named)[1:]},
        args.rounds,
        setup=lambda name: model.set_widths(named[name]),
    )
    print(machine(model))
    print(f"forward, backward and AdamW on {args.batch_size} x {args.length} tokens")
    print(f"{'full':36} {1e3 * full.median:8.0f} ms   ratio 1.000")
    for name, found in others.items():
        low, high = min(found.ratios), max(found.ratios)
        ms = 1e3 * full.median * found.ratio
        print(f"{name:36} {ms:8.0f} ms   ratio {found.ratio:.3f}   {low:.3f} .. {high:.3f}")


def machine(model: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine_of(model).items())


# ---- tokens per second


def tokens(args: argparse.Namespace) -> None:
    """The demonstration's training: distillation from the model as it was, held in bfloat16 where that is fast."""
    model = elastic(smollm2_shape())
    print(machine(model))
    print(f"flextron.training.train, distillation, steps of {args.batch_size} x {args.length} tokens")
    for name, network in {"half": halved(model.elastic), "full": None}.items():
        if args.network not in ("both", name):
            continue
        rates, busy, spent, wall = trained(model, network, args)
        steps = sorted(rates)
        print(
            f"{name}: {median(rates):.0f} tokens/s ({steps[0]:.0f} .. {steps[-1]:.0f} of {len(rates)} steps), "
            f"{busy:.2f} s of processor time a step"
        )
        for what, seconds in spent.items():
            print(f"  {what:32} {1e3 * seconds:7.0f} ms  {seconds / wall:6.1%}")


def trained(
    model: Any, network: Widths | None, args: argparse.Namespace
) -> tuple[list[float], float, dict[str, float], float]:
    """Tokens per second of each step that counts, a step's processor time, and what a further step spends its time on.

    ``network``: the only one that is trained; None: the full one.
    """
    config = TrainConfig(
        steps=WARM + args.steps + 1,
        batch_size=args.batch_size,
        length=args.length,
        cross_entropy=0.0,
        distillation=1.0,
        weight_decay=0.0,
        eval_every=0,
        checkpoint_every=0,
        full_probability=float(network is None),
        networks=() if network is None else (network,),
    )
    teacher = copy.deepcopy(model).to(torch.bfloat16)
    teacher.set_widths(model.elastic.full())
    text = torch.randint(model.elastic.vocab_size, (config.batch_size * config.length * config.steps,))
    rates: list[float] = []
    clock = [0.0, 0.0]  # processor time at the first step that counts, and behind the last
    profiler = profile(activities=[ProfilerActivity.CPU])

    def told(step: int, steps: int, record: Mapping[str, Any]) -> None:
        if WARM < step < steps:
            rates.append(record["tokens_per_s"])
        if step == WARM:
            clock[0] = process_time()
        if step == steps - 1:
            clock[1] = process_time()
            profiler.start()
        if step == steps:
            profiler.stop()
            wall.append(record["seconds"])

    wall: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train(model, text, config, folder, teacher=teacher, progress=told)
    return rates, (clock[1] - clock[0]) / args.steps, divided(profiler.key_averages(), wall[0]), wall[0]


def divided(events: Any, wall: float) -> dict[str, float]:
    """Seconds of a step by `DIVISION`, of all other operations, and of what is around them."""
    spent = dict.fromkeys((*DIVISION, "other operations"), 0.0)
    for event in events:
        found = (name for name, begin in DIVISION.items() if event.key.startswith(begin))
        spent[next(found, "other operations")] += event.self_cpu_time_total / 1e6
    return spent | {"around the operations": wall - sum(spent.values())}


# ---- two processes at once


def contention(args: argparse.Namespace) -> None:
    """Steps per second of one process alone, and of two at once; each waits for the others to be ready."""
    print(f"a model of stories260K's shape, 8 x 128 tokens, {args.seconds:.0f} s, steps per second")
    for spins in (None, SPINS):
        how = "libgomp's own waiting" if spins is None else f"GOMP_SPINCOUNT={spins}, the command line's"
        before, (one, other), after = (together(count, spins, args) for count in (1, 2, 1))
        alone = (before[0] + after[0]) / 2
        print(
            f"{how}: alone {before[0]:.1f} and {after[0]:.1f}, two at once {one:.1f} and {other:.1f}: "
            f"each loses a factor of {alone / one:.2f} and {alone / other:.2f}"
        )


def together(count: int, spins: str | None, args: argparse.Namespace) -> list[float]:
    """Steps per second of so many processes at once."""
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    env |= {} if spins is None else {"GOMP_SPINCOUNT": spins}
    command = [sys.executable, __file__, "toy", "--seconds", str(args.seconds)]
    pipe = subprocess.PIPE
    runs = [subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]
    for run in runs:
        assert run.stdout is not None and run.stdout.readline() == "ready\n"
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("go\n")
        run.stdin.flush()
    return [float(run.communicate()[0]) for run in runs]


def toy(args: argparse.Namespace) -> None:
    """Trains a toy for so many seconds, and prints its steps per second: one of the processes of `contention`."""
    model = elastic(toy_shape())
    text = torch.randint(model.elastic.vocab_size, (1 << 16,))
    config = TrainConfig(steps=10**6, batch_size=8, length=128, eval_every=0, checkpoint_every=0)
    began = [0.0]

    class Over(Exception):
        pass

    def told(step: int, _: int, record: Mapping[str, Any]) -> None:
        if step == WARM:
            print("ready", flush=True)
            sys.stdin.readline()
            began[0] = perf_counter()
        elif step > WARM and perf_counter() - began[0] > args.seconds:
            raise Over((step - WARM) / (perf_counter() - began[0]))

    with tempfile.TemporaryDirectory() as folder:
        try:
            train(model, text, config, folder, progress=told)
        except Over as over:
            print(over)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", default="widths", choices=("widths", "tokens", "contention", "toy")
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="of widths")
    parser.add_argument("--steps", type=int, default=6, help="of tokens: how many count")
    parser.add_argument("--network", choices=("both", "half", "full"), default="both", help="of tokens")
    parser.add_argument("--seconds", type=float, default=4.0, help="of contention")
    parser.add_argument("--no-wait", action="store_true", help="time at once, whatever else runs")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if not args.no_wait and args.what != "toy":
        wait_until_idle()
    {"widths": widths, "tokens": tokens, "contention": contention, "toy": toy}[args.what](args)


if __name__ == "__main__":
    main()
