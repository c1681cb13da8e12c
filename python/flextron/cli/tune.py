"""Train the model and one of its routers jointly, in place; a killed run resumes."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli.printing import say, training_result
from flextron.recipes import TuneConfig

EXAMPLE = "flextron tune elastic/ --adaptive --distillation 1"
FIELDS = [
    "steps", "batch_size", "length", "accumulation", "learning_rate", "router_rate", "gates",
    "latency_weight", "cross_entropy", "distillation", "teacher_logits", "full_probability", "bf16",
    "checkpoint_activations", "shard", "eval_every", "checkpoint_every", "seed",
]  # fmt: skip


def options(parser: ArgumentParser) -> None:
    parser.add_argument("directory", help="elastic checkpoint to tune, in place; it must have routers")
    shared.data(parser, written=True)
    parser.add_argument(
        "--adaptive",
        action="store_true",
        help="tune with the router that chooses for every token, not with the static one",
    )
    shared.from_fields(parser, TuneConfig, FIELDS)
    shared.restart(parser)
    shared.stored_dtype(parser, "the one that each tensor has in the checkpoint; tuning itself is in float32")
    shared.device(parser)


def run(args: Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui
    from flextron.training.meter import line

    config = shared.taken(TuneConfig, args)
    with ui.reporter() as progress:
        report = pipeline.tune(
            args.directory,
            config,
            adaptive=args.adaptive,
            data=shared.text_of(args),
            restart=args.restart,
            dtype=args.dtype,
            device=args.device,
            planned=ui.tell,
            progress=progress,
            measured=lambda record: progress.note(line(record)),
        )
    say(args, f"{args.directory}: tuned on {report.tokens} tokens, {report.seconds:.0f} s in this run")
    return training_result(report)
