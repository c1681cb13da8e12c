"""Train every sub-network of an elastic checkpoint further, in place; a killed run resumes."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli.printing import say, training_result
from flextron.recipes import TrainConfig

EXAMPLE = "flextron train elastic/ --steps 500 --distillation 1"
FIELDS = [
    "steps", "batch_size", "length", "accumulation", "learning_rate", "cross_entropy", "distillation",
    "teacher_logits", "full_probability", "bf16", "checkpoint_activations", "shard", "widths_per_rank",
    "eval_every", "checkpoint_every", "seed",
]  # fmt: skip


def options(parser: ArgumentParser) -> None:
    parser.add_argument("directory", help="elastic checkpoint to train, in place")
    shared.data(parser, written=True)
    parser.add_argument(
        "--ladder",
        action="store_true",
        help="train the networks that the routers choose at their targets, and no others; the routers stay",
    )
    shared.from_fields(parser, TrainConfig, FIELDS)
    shared.restart(parser)
    shared.stored_dtype(
        parser, "the one that each tensor has in the checkpoint; training itself is in float32"
    )
    shared.device(parser)


def run(args: Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui
    from flextron.training.meter import line

    config = shared.taken(TrainConfig, args)
    with ui.reporter() as progress:
        report = pipeline.train(
            args.directory,
            config,
            data=shared.text_of(args),
            ladder=args.ladder,
            restart=args.restart,
            dtype=args.dtype,
            device=args.device,
            planned=ui.tell,
            progress=progress,
            measured=lambda record: progress.note(line(record)),
        )
    if not args.json and report.evaluations:
        rows = [
            [
                f"{record['step']}, as stored" if record.get("stored") else str(record["step"]),
                *(f"{row['loss']:.3f}" for row in record["sub_networks"]),
            ]
            for record in report.evaluations
        ]
        sizes = [f"size {row['size']:.2f}" for row in report.evaluations[0]["sub_networks"]]
        ui.print_table("held-out loss by share of the elastic size", ["step", *sizes], rows)
    say(args, f"{args.directory}: trained on {report.tokens} tokens, {report.seconds:.0f} s in this run")
    return training_result(report)
