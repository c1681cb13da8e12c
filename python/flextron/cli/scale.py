"""Say what training takes on so many GPUs, on paper: memory, traffic, time, and what to type."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flextron.cli import options as shared
from flextron.cli import values
from flextron.cli.printing import say
from flextron.config import ElasticConfig
from flextron.devices import DEVICES
from flextron.recipes import StepConfig
from flextron.scale.memory import FLOAT, HALF
from flextron.scale.plans import Plan, first_that_fits
from flextron.scale.shapes import SHAPES, STORED

EXAMPLE = "flextron scale --shape 8b --gpus 1,8,64 --gpu h100"
FIELDS = ["rows", "accumulation", "node", "teacher"]


def options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source", nargs="?", help="elastic checkpoint or model directory whose shape to take; or --shape"
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), help="shape of Llama 3.2 1B, Llama 3.1 8B or 70B")
    parser.add_argument(
        "--gpus", type=values.counts, default=(1, 8, 16, 64), metavar="N,N,..", help="numbers of GPUs"
    )
    parser.add_argument(
        "--gpu",
        choices=tuple(d.name for d in DEVICES),
        default="h100",
        help="GPU to plan for, by its data sheet",
    )
    parser.add_argument(
        "--length",
        type=values.at_least(2),
        help=f"tokens in a training sequence (default: {StepConfig.length}, or the model's positions where they are "
        "fewer)",
    )
    shared.from_fields(parser, StepConfig, FIELDS)


def run(args: Namespace) -> dict[str, Any]:
    from flextron import ui

    name, shape, length, value = _shape(args)
    step = StepConfig(length=length, teacher_value=value, **shared.given(args, *FIELDS))
    if odd := [n for n in args.gpus if n > step.node and n % step.node]:
        raise ValueError(
            f"scale: --gpus must be at most --node, {step.node}, or a multiple of it, got {odd[0]}"
        )
    device = next(d for d in DEVICES if d.name == args.gpu)
    plans = [first_that_fits(shape, step, ranks, device) for ranks in args.gpus]
    directory = _trained(args.source)
    if not args.json:
        ui.print_table(f"{name} on {args.gpu}, on paper", header(plans), rows(plans))
        for p, gpus in zip(plans, header(plans)[1:], strict=True):
            say(args, f"{gpus}: {p.command(directory) if p.fits else 'nothing fits'}")
    return {"shape": name, "gpu": args.gpu, "plans": [_facts(p, directory) for p in plans]}


def _shape(args: Namespace) -> tuple[str, ElasticConfig, int, int]:
    """A name, a shape, the tokens in a sequence, and the bytes of a stored weight, which a teacher is held in."""
    if (args.source is None) == (args.shape is None):
        raise ValueError(
            f"scale: either SOURCE or --shape must be given, got {'neither' if args.shape is None else 'both'}"
        )
    if args.shape is not None:
        return args.shape, SHAPES[args.shape], args.length or StepConfig.length, STORED
    import torch
    from transformers import AutoConfig

    from flextron.artefacts.directory import check_length
    from flextron.checkpoint import CONFIG_FILE, ELASTIC_FILE, Origin
    from flextron.checkpoint.hf import foreign
    from flextron.checkpoint.hub import local
    from flextron.nn.families import elastic_config

    folder = local(args.source, tokenizer_only=True)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"scale: {args.source} must hold a model, got no {CONFIG_FILE}")
    with foreign(folder / CONFIG_FILE, "a configuration that transformers reads"):
        config = AutoConfig.from_pretrained(folder)
    if args.length is not None:
        check_length("scale", args.length, config, "--length")
    positions = getattr(config, "max_position_embeddings", None) or StepConfig.length
    shape = Origin.read(folder).elastic if (folder / ELASTIC_FILE).is_file() else elastic_config(config)
    value = HALF if config.dtype in (torch.bfloat16, torch.float16) else FLOAT
    return args.source, shape, args.length or min(StepConfig.length, positions), value


def _trained(source: str | None) -> str:
    """The directory that `train` takes: the source, or where `convert` would make one of it."""
    from flextron.checkpoint import ELASTIC_FILE

    is_elastic = source is not None and Path(source, ELASTIC_FILE).is_file()
    return shlex.quote(source) if source is not None and is_elastic else "elastic/"


def header(plans: list[Plan]) -> list[str]:
    """The first line of the table of some plans, which has a column for each."""
    return ["GB on each GPU", *(f"{p.ranks} GPUs" if p.ranks > 1 else "1 GPU" for p in plans)]


def rows(plans: list[Plan]) -> list[list[str]]:
    """The other lines."""
    facts: dict[str, Callable[[Plan], str]] = {
        "plan": lambda p: p.name,
        "weights": lambda p: _gb(p.memory.parameters),
        "optimiser states": lambda p: _gb(p.memory.states),
        "gradients": lambda p: _gb(p.memory.gradients),
        "activations": lambda p: _gb(p.memory.activations),
        "gathered": lambda p: _gb(p.memory.gathered),
        "teacher": lambda p: _gb(p.memory.teacher),
        "in all": lambda p: _gb(p.memory.total),
        "fits": lambda p: "yes" if p.fits else "no",
        "sent in the node": lambda p: _gb(p.speed.node_bytes),
        "sent to other nodes": lambda p: _gb(p.speed.network_bytes),
        "seconds for 1M tokens": lambda p: f"{p.speed.per_million:.2g}" if p.fits else "-",
    }
    return [[name, *map(fact, plans)] for name, fact in facts.items()]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size else "0"


def _facts(plan: Plan, directory: str) -> dict[str, Any]:
    return {
        "gpus": plan.ranks,
        "step": asdict(plan.step),
        "memory": asdict(plan.memory) | {"total": plan.memory.total},
        "speed": asdict(plan.speed) | {"seconds": plan.speed.seconds},
        "fits": plan.fits,
        "command": plan.command(directory),
    }
