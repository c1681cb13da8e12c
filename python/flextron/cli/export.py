"""Write one budget's sub-network as a plain transformers checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli.printing import dtypes, rounding, say

EXAMPLE = "flextron export elastic/ small/ --budget 0.6"


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    shared.checkpoint(parser)
    add("out", help="directory to write the plain checkpoint to")
    shared.budget(parser)
    add("--force", "--overwrite", action="store_true", help="replace the model that is in OUT")
    add(
        "--layout",
        choices=("auto", "uniform", "padded", "ragged"),
        default="auto",
        help="how layers of different widths are stored: uniform and padded load in stock transformers, ragged keeps "
        "a width for every layer",
    )
    shared.stored_dtype(parser, "the one that each tensor has in the checkpoint")
    shared.device(parser)


def run(args: Namespace) -> dict[str, Any]:
    from flextron.checkpoint.hf import read_tokenizer
    from flextron.exporting import export
    from flextron.inference import from_pretrained
    from flextron.nn.placement import one_device

    device = one_device("export", args.device)
    directory = shared.fetched(args)
    model = from_pretrained(directory, "float32", device=device)
    widths: Any = model.set_budget(**shared.budget_of(args))
    tokenizer = read_tokenizer(directory)
    report = export(
        model, args.out, widths, layout=args.layout, tokenizer=tokenizer, dtype=args.dtype, force=args.force
    )
    parity = report["parity"]
    say(
        args,
        f"{args.out}: {report['params']} parameters, {report['layout']}, stored in {dtypes(report['dtypes'])}; "
        f"read back within {parity['max_rel']:.1e} of the elastic model's largest logit{rounding(parity)}",
    )
    if report.get("note"):
        say(args, report["note"])
    return report
