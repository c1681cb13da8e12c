"""Write one budget's sub-network as a plain transformers checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from flextron.cli import options as shared
from flextron.cli import values
from flextron.cli.printing import dtypes, rounding, say

EXAMPLE = "flextron export elastic/ small/ --budget 0.6"
_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k")
_LENGTH = 256  # tokens in a sequence of --refit


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    shared.checkpoint(parser)
    add("out", help="directory to write the plain checkpoint to; of --format gguf the file, *.gguf")
    add(
        "--format",
        choices=("hf", "gguf"),
        default="hf",
        help="hf: a Hugging Face directory; gguf: one file with its tokenizer, for llama.cpp and what is built on it",
    )
    shared.budget(parser)
    add("--force", "--overwrite", action="store_true", help="replace the model that is in OUT")
    add(
        "--type",
        choices=_TYPES,
        help="what a GGUF file's matrices are stored as (default: f16); rows that do not divide into a type's blocks "
        "are stored in the next wider one",
    )
    add(
        "--layout",
        choices=("auto", "uniform", "padded", "ragged"),
        default="auto",
        help="how layers of different widths are stored: uniform and padded load in stock transformers, ragged keeps "
        "a width for every layer",
    )
    add(
        "--refit",
        type=values.count,
        metavar="N",
        help="fit the last projection of every MLP and attention to this one network, on N sequences of 256 tokens of "
        "--data: better at no cost, but no longer the elastic model's own sub-network",
    )
    shared.data(parser)
    shared.stored_dtype(parser, "the one that each tensor has in the checkpoint")
    shared.device(parser)


def run(args: Namespace) -> dict[str, Any]:
    from flextron.checkpoint.hf import read_tokenizer
    from flextron.exporting import export, export_gguf
    from flextron.inference import from_pretrained
    from flextron.nn.placement import one_device

    text = shared.text_of(args)
    if text is not None and args.refit is None:
        raise ValueError("export: --data must go with --refit, got it alone")
    for name, other, default in (("type", "gguf", None), ("dtype", "hf", "auto")):
        if args.format != other and getattr(args, name) != default:
            raise ValueError(
                f"export: --{name} must be given with --format {other}, got --format {args.format}"
            )
    device = one_device("export", args.device)
    directory = shared.fetched(args)
    model = from_pretrained(directory, "float32", device=device)
    widths: Any = model.set_budget(**shared.budget_of(args))
    tokenizer = read_tokenizer(directory)
    with _fitted(args.refit, model, widths, tokenizer, text) as found:
        common = {"layout": args.layout, "tokenizer": tokenizer, "force": args.force}
        if args.format == "gguf":
            report = export_gguf(model, args.out, widths, kind=args.type or "f16", **common)
        else:
            report = export(model, args.out, widths, dtype=args.dtype, **common)
    parity = report["parity"]
    if args.format == "gguf":
        types = ", ".join(f"{n} {name}" for name, n in report["types"].items())
        stored = f" in {report['architecture']}, {report['bytes'] / 1e6:.1f} MB of {types}"
    else:
        stored = f", stored in {dtypes(report['dtypes'])}"
    say(
        args,
        f"{args.out}: {report['params']} parameters, {report['layout']}{stored}; read back within "
        f"{parity['max_rel']:.1e} of the elastic model's largest logit{rounding(parity)}",
    )
    if report.get("note"):
        say(args, report["note"])
    return report if found is None else {**report, "refit": found.to_dict()}


@contextmanager
def _fitted(samples: int | None, model: Any, widths: Any, tokenizer: Any, text: Any) -> Iterator[Any]:
    """A ``with`` block in which the model serves one network alone, where that was asked for."""
    if samples is None:
        yield None
        return
    from flextron import ui
    from flextron.conversion.refit import refitted
    from flextron.corpus import corpus, windows

    calibration = windows(corpus(tokenizer, text).train, samples, _LENGTH, "refit")
    with ui.reporter() as progress:
        told = partial(progress, "fitting the last projections")
        with refitted(model, widths, calibration, progress=told) as found:
            yield found
