"""Score and sort neurons and heads, prove that nothing changed, store an elastic checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli import values
from flextron.cli.printing import dtypes, rounding, say

EXAMPLE = "flextron convert HuggingFaceTB/SmolLM2-135M elastic/"


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="model directory, hub id or GGUF file; the families are in docs/families.md")
    add("directory", help="elastic checkpoint to write; stock transformers still loads it")
    shared.data(parser)
    add("--samples", type=values.count, default=512, help="number of sequences that importance is scored on")
    add("--length", type=values.count, default=256, help="tokens in each of these sequences")
    add(
        "--unit",
        choices=("kv_group", "query"),
        default="kv_group",
        help="what the head axis counts: key/value groups with their query heads, or query heads of every group",
    )
    add(
        "--aggregate",
        choices=("l2", "mean_abs", "variance"),
        default="l2",
        help="how to combine a neuron's importance over tokens",
    )
    add(
        "--order",
        choices=("importance", "none", "random"),
        default="importance",
        help="how to sort neurons and heads; none and random are there to compare with",
    )
    add(
        "--mlp-choices",
        type=values.wholes,
        metavar="N,N,..",
        help="menu of MLP widths in neurons, ascending to the parent's own; from 0, where a layer may skip its MLP; "
        "quarters of the parent's own by default",
    )
    add(
        "--head-choices",
        type=values.wholes,
        metavar="N,N,..",
        help="menu of head counts in --unit, ascending to the parent's own; from 0, where a layer may skip its "
        "attention; quarters of the parent's own by default",
    )
    add(
        "--seed",
        type=values.whole,
        default=0,
        help="seed of the random order and of the sub-networks that are proven",
    )
    shared.stored_dtype(parser, "the one that each tensor has in the source")
    shared.device(parser)
    add("--force", action="store_true", help="replace the model that is in DIRECTORY")
    add(
        "--strip-prefix",
        metavar="PREFIX",
        help="take PREFIX (such as _orig_mod. or module.) off every tensor's name in the source",
    )
    add(
        "--like",
        metavar="FAMILY",
        help="convert a model_type that is not in the table of families as one that is, if that is proven",
    )
    add(
        "--merge-adapter",
        metavar="PATH",
        help="merge this low-rank adapter, a directory or hub id, into the source first; needs peft",
    )


def run(args: Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui

    passed = (
        "samples",
        "length",
        "unit",
        "aggregate",
        "order",
        "mlp_choices",
        "head_choices",
        "seed",
        "dtype",
        "device",
    )
    with ui.reporter() as progress:
        report = pipeline.convert(
            args.source,
            args.directory,
            data=shared.text_of(args),
            planned=ui.tell,
            progress=progress,
            strip_prefix=args.strip_prefix,
            like=args.like,
            adapter=args.merge_adapter,
            force=args.force,
            **{name: getattr(args, name) for name in passed},
        )
    say(args, f"{args.directory}: {_certified(report)}")
    return report


def _certified(report: dict[str, Any]) -> str:
    """What a conversion proved, in one sentence."""
    parity = report["parity"]
    dropped = "".join(f"; {name} {p} set to 0" for name, p in report.get("dropped", {}).items())
    widest = max(s["max_rel"] for s in parity["sub_networks"])
    return (
        f"stored in {dtypes(report['dtypes'])}; read back as {parity['dtype']} by stock transformers, within "
        f"{parity['max_rel']:.1e} of the parent's largest logit{rounding(parity)}; "
        f"{len(parity['sub_networks'])} sub-networks within {widest:.1e} of plain models{dropped}"
    )
