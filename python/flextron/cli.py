"""The command line: parses, calls `flextron.pipeline`, prints."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Errors that are the user's to mend: one sentence and exit code 2. Anything else is ours, and keeps its traceback.
_EXPECTED = (ValueError, OSError, NotImplementedError, FloatingPointError)

# argparse's sentences, and ours. What it says of a value is in our words already: see `_count` and its neighbours.
_REPHRASED = (
    (r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)", r"\1 must be one of \3, got \2"),
    (r"argument (\S+): expected (?:one|1) argument", r"\1 must be followed by a value, got none"),
    (r"argument (\S+): not allowed with argument (\S+)", r"\1 must not be given with \2, got both"),
    (r"argument (\S+): ignored explicit argument (.+)", r"\1 must be given without a value, got \2"),
    (r"argument (\S+): (.+)", r"\1 \2"),
    (r"the following arguments are required: (.+)", r"\1 must be given, got nothing"),
    (r"unrecognized arguments: (.+)", r"arguments must be among those that --help lists, got \1"),
    (r"ambiguous option: (\S+) could match (.+)", r"options must be written out as one of \2, got \1"),
)


class _UsageError(ValueError):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    """Says in one sentence of ours what is wrong with the command line."""

    def error(self, message: str) -> NoReturn:
        _, _, command = self.prog.partition(" ")
        for theirs, ours in _REPHRASED:
            if found := re.fullmatch(theirs, message, re.DOTALL):
                message = found.expand(ours)
                break
        raise _UsageError(f"{command}: {message}" if command else message)


class _Version(argparse.Action):
    """Prints what this installation is, in two lines."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print("\n".join(_installed()))
        parser.exit()


def _installed() -> tuple[str, str]:
    """Versions; and what the ops were built for and run on here."""
    import platform
    from importlib.metadata import version

    import torch

    own = f"flextron {version('flextron')}, torch {torch.__version__}, Python {platform.python_version()}"
    try:
        from flextron_ext import build_info
    except ImportError as error:
        return own, f"ops: {_sentence(str(error))}"
    info = build_info()
    here = os.environ.get("FLEXTRON_ISA") or (
        "avx512"
        if torch.cpu._is_avx512_supported()
        else "avx2"
        if torch.cpu._is_avx2_supported()
        else "baseline"
    )
    cuda = ", ".join(info["cuda_archs"]) or "none"
    return own, f"ops: CPU {', '.join(info['isas'])} (here {here}), CUDA {cuda}, compiler {info['compiler']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # Progress is ours to show, and what transformers tells of files that are used anyway helps nobody.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # ten lines of tries before our sentence
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _main(argv)


def _warn(message: Warning | str, *_: Any) -> None:
    """A warning as a sentence, without the line of code that it came from."""
    print(f"flextron: warning: {_sentence(str(message))}", file=sys.stderr)


def _sentence(text: str) -> str:
    """The first line that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _main(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
    except _UsageError as error:
        print(f"flextron: {error}", file=sys.stderr)
        return 2
    try:
        _join_field(args)
        result = args.run(args)
    except ModuleNotFoundError as error:
        if (error.name or "flextron").partition(".")[0] in ("flextron", "flextron_ext"):
            raise
        print(f"flextron: {args.command} needs {error.name}; pip install 'flextron[all]'", file=sys.stderr)
        return 2
    except _EXPECTED as error:
        print(f"flextron: {_said(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(
            f"flextron: {args.command}: lengths, batches and models must fit into memory, got {_sentence(str(error))}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"flextron: {args.command} interrupted", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(result, indent=2))
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, torch's allocator for the CPU (which has no class of its own) or that of a GPU found none."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or "can't allocate memory" in str(error)


def _said(error: Exception) -> str:
    """What an error says, in one sentence."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename} must be usable, got {error.strerror[:1].lower()}{error.strerror[1:]}"
    return _sentence(str(error)) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flextron",
        description="Elastic language models: one checkpoint that runs at any latency target.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print versions and what the ops were built for, and exit"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., Any], summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example: {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
        return sub

    c = command(
        "convert",
        _convert,
        "score and sort neurons and heads, prove that nothing changed, store",
        "flextron convert HuggingFaceTB/SmolLM2-135M elastic/",
    )
    c.add_argument("source", help="model directory or hub id of a Llama, Mistral, Qwen2 or Qwen3 checkpoint")
    c.add_argument("directory", help="elastic checkpoint to write; stock transformers still loads it")
    _data(c)
    c.add_argument("--samples", type=_count, default=512, help="calibration sequences")
    c.add_argument("--length", type=_count, default=256, help="tokens of each")
    c.add_argument(
        "--unit", choices=("kv_group", "query"), default="kv_group", help="what the head axis counts"
    )
    c.add_argument(
        "--aggregate", choices=("l2", "mean_abs", "variance"), default="l2", help="of importance over tokens"
    )
    c.add_argument(
        "--order", choices=("importance", "none", "random"), default="importance", help="for comparisons"
    )
    c.add_argument(
        "--mlp-choices", type=_ints, metavar="N,N,..", help="menu of MLP widths; quarters by default"
    )
    c.add_argument("--head-choices", type=_ints, metavar="N,N,..", help="menu of head counts, in the unit")
    c.add_argument(
        "--seed", type=_seed, default=0, help="of the random order and of the widths that are proven"
    )
    _dtype(c, "each tensor's own in the source")
    c.add_argument("--force", action="store_true", help="replace the model that is in DIRECTORY")
    c.add_argument(
        "--strip-prefix",
        metavar="PREFIX",
        help="take PREFIX (_orig_mod., module.) off every tensor's name in the source",
    )

    t = command(
        "train",
        _train,
        "elastic continued training, in place; resumes a killed run",
        "flextron train elastic/ --steps 500 --distillation 1",
    )
    t.add_argument("directory")
    _data(t)
    t.add_argument(
        "--steps",
        type=_count,
        default=1000,
        help="steps in all; more than a finished run has go on from its end",
    )
    t.add_argument("--batch-size", type=_count, default=8, help="sequences in a micro-batch")
    t.add_argument("--length", type=_count, default=512, help="tokens of each")
    t.add_argument(
        "--accumulation", type=_count, default=1, help="micro-batches in a step, each at other widths"
    )
    t.add_argument("--learning-rate", type=_float, default=1e-4)
    t.add_argument("--cross-entropy", type=_float, default=1.0, help="weight of the next-token loss")
    t.add_argument(
        "--distillation", type=_float, default=0.0, help="weight of the divergence from the checkpoint"
    )
    t.add_argument(
        "--full-probability", type=_float, default=0.3, help="share of micro-batches at full width"
    )
    t.add_argument("--eval-every", type=_number, default=100, help="steps between evaluations, 0 for none")
    t.add_argument("--checkpoint-every", type=_number, default=100, help="steps between checkpoints")
    t.add_argument("--restart", action="store_true", help="discard an unfinished run instead of resuming it")
    _dtype(t, "each tensor's own in the checkpoint; training itself is in float32")
    t.add_argument("--seed", type=_seed, default=0)

    p = command(
        "profile",
        _profile,
        "measure the latency table on this machine",
        "flextron profile elastic/ --length 512",
    )
    p.add_argument("directory")
    p.add_argument("--phase", choices=("prefill", "decode", "both"), default="both")
    p.add_argument("--length", type=_count, default=512, help="tokens of a prefill")
    p.add_argument("--context", type=_count, default=512, help="cached tokens of a decode step")
    p.add_argument("--batch", type=_count, default=1, help="sequences")
    p.add_argument("--rounds", type=_count, default=7, help="samples of each measurement")
    p.add_argument("--seed", type=_seed, default=0, help="of the configurations that the fit is judged on")

    r = command("route", _route, "train the routers on the latency table", "flextron route elastic/")
    r.add_argument("directory")
    _data(r)
    r.add_argument(
        "--phase", choices=("prefill", "decode"), default="prefill", help="whose latency the targets mean"
    )
    r.add_argument(
        "--targets", type=_floats, metavar="T,T,..,1", help="fractions of the full latency to train at"
    )
    r.add_argument(
        "--form",
        choices=("surrogate", "gumbel", "search"),
        help="the routers' loss: the surrogate's (the default), the model's own end to end (gumbel; the default with "
        "--adaptive), or none but what search finds (not with --adaptive)",
    )
    r.add_argument(
        "--evaluations",
        type=_count,
        help="losses of the model that may be asked for; 700, not with --adaptive",
    )
    r.add_argument(
        "--prefill",
        type=_count,
        help="of them, random configurations at the start; 500, with --adaptive --form surrogate 200",
    )
    r.add_argument("--steps", type=_count, help="steps of the routers; 1500, with --adaptive 400")
    r.add_argument(
        "--samples",
        type=_count,
        help="sequences behind one loss; 4, with --adaptive 64 to train and judge on",
    )
    r.add_argument("--length", type=_count, default=128, help="tokens of each")
    r.add_argument("--seed", type=_seed, default=0)
    r.add_argument(
        "--adaptive",
        action="store_true",
        help="train the router that chooses for every token, from where the static routers are",
    )
    r.add_argument(
        "--gates",
        choices=("soft", "hard"),
        help="with --adaptive: how it learns, by mixtures of widths (the default) or by choices, straight-through",
    )

    u = command(
        "tune",
        _tune,
        "train the model and a router jointly, in place; resumes a killed run",
        "flextron tune elastic/ --adaptive --distillation 1",
    )
    u.add_argument("directory")
    _data(u)
    u.add_argument(
        "--adaptive",
        action="store_true",
        help="with the router that chooses for every token, not the static one",
    )
    u.add_argument(
        "--steps",
        type=_count,
        default=200,
        help="steps in all; more than a finished run has go on from its end",
    )
    u.add_argument(
        "--batch-size", type=_count, default=8, help="sequences in a micro-batch, each at a target"
    )
    u.add_argument("--length", type=_count, default=512, help="tokens of each")
    u.add_argument("--accumulation", type=_count, default=1, help="micro-batches in a step")
    u.add_argument("--learning-rate", type=_float, default=1e-4, help="of the model")
    u.add_argument(
        "--router-rate", type=_float, default=30.0, help="the router's, as a multiple of the model's"
    )
    u.add_argument(
        "--gates",
        choices=("soft", "hard"),
        default="hard",
        help="mixtures of widths, or choices, straight-through",
    )
    u.add_argument("--latency-weight", type=_float, default=5.0, help="of the distance from the target")
    u.add_argument("--cross-entropy", type=_float, default=1.0, help="weight of the next-token loss")
    u.add_argument(
        "--distillation", type=_float, default=0.0, help="weight of the divergence from the checkpoint"
    )
    u.add_argument(
        "--full-probability", type=_float, default=0.3, help="share of micro-batches at full width"
    )
    u.add_argument("--eval-every", type=_number, default=100, help="steps between evaluations, 0 for none")
    u.add_argument("--checkpoint-every", type=_number, default=100, help="steps between checkpoints")
    u.add_argument("--restart", action="store_true", help="discard an unfinished run instead of resuming it")
    u.add_argument("--seed", type=_seed, default=0)

    e = command(
        "eval",
        _eval,
        "loss and measured latency, or benchmarks, at a list of budgets",
        "flextron eval elastic/ --budgets 0.5,0.75,1",
    )
    e.add_argument("directory", help="elastic checkpoint, or the hub id of one")
    _data(e)
    e.add_argument(
        "--budgets",
        type=_floats,
        default=(0.5, 0.75, 1.0),
        metavar="B,B,..",
        help="fractions of full latency",
    )
    e.add_argument("--adaptive", action="store_true", help="also at widths of every token's own")
    e.add_argument("--phase", choices=("prefill", "decode"), default="prefill")
    e.add_argument("--samples", type=_count, default=16, help="held-out sequences")
    e.add_argument("--length", type=_count, default=256, help="tokens of each")
    e.add_argument("--rounds", type=_count, default=7, help="samples of each measurement")
    e.add_argument(
        "--tasks",
        type=_names,
        metavar="T,T,..",
        help="benchmarks (lm-evaluation-harness): arc_easy, hellaswag, lambada_openai, mmlu, piqa, winogrande",
    )
    e.add_argument("--limit", type=_count, help="with --tasks: questions of each; all by default")
    e.add_argument(
        "--data-dir",
        metavar="DIR",
        help="with --tasks: folder of their files; default $FLEXTRON_DATA/benchmarks",
    )
    _pack(e)

    g = command(
        "generate",
        _generate,
        "continue a prompt at a budget",
        'flextron generate elastic/ --budget 0.6 --prompt "Once"',
    )
    g.add_argument("directory", help="elastic checkpoint, or the hub id of one")
    _budget(g)
    g.add_argument("--adaptive", action="store_true", help="let every token have widths of its own")
    g.add_argument("--prompt", required=True)
    g.add_argument("--max-new-tokens", type=_count, default=64)
    _pack(g)

    x = command(
        "export",
        _export,
        "write one budget as a plain transformers checkpoint",
        "flextron export elastic/ small/ --budget 0.6",
    )
    x.add_argument("directory", help="elastic checkpoint, or the hub id of one")
    x.add_argument("out")
    _budget(x)
    x.add_argument("--force", "--overwrite", action="store_true", help="replace the model that is in OUT")
    x.add_argument(
        "--layout",
        choices=("auto", "uniform", "padded", "ragged"),
        default="auto",
        help="uniform and padded load in stock transformers; ragged keeps a width for every layer",
    )
    _dtype(x, "each tensor's own in the checkpoint")

    i = command("info", _info, "what an elastic checkpoint holds", "flextron info elastic/")
    i.add_argument("directory", help="elastic checkpoint, or the hub id of one")

    k = command(
        "clean",
        _clean,
        "remove what only resuming needs: the optimiser states of finished runs",
        "flextron clean elastic/ --dry-run",
    )
    k.add_argument("directory")
    k.add_argument("--dry-run", action="store_true", help="only say what would go")
    k.add_argument(
        "--unfinished",
        action="store_true",
        help="also of runs that were stopped, which can then not be resumed",
    )

    p = command(
        "report",
        _report,
        "measure the budgets and write one HTML page of figures into the checkpoint",
        "flextron report elastic/",
    )
    p.add_argument("directory")
    _data(p)
    p.add_argument(
        "--budgets",
        type=_floats,
        default=(0.5, 0.6, 0.7, 0.8, 0.9),
        metavar="B,B,..",
        help="fractions of full latency",
    )
    p.add_argument("--samples", type=_count, default=16, help="held-out sequences")
    p.add_argument("--length", type=_count, default=256, help="tokens of each")
    p.add_argument("--rounds", type=_count, default=5, help="samples of each measurement")

    s = command(
        "reproduce",
        _reproduce,
        "run the study of python/studies, or go on with it",
        "flextron reproduce --out study/",
    )
    s.add_argument("--out", default="study", help="folder; what is there already is not done again")
    s.add_argument("--parents", type=_names, default=("stories260k",), metavar="P,P", help="also stories15m")
    s.add_argument("--seeds", type=_ints, default=(0, 1, 2), metavar="N,N,..")
    s.add_argument(
        "--stages",
        type=_names,
        metavar="S,S,..",
        help="prepare, profile, train, route, adaptive, latency; all by default. profile and latency want a quiet "
        "machine",
    )
    s.add_argument(
        "--minutes", type=_float, help="stop after the run during which they pass; call again to go on"
    )

    d = command(
        "demo",
        _demo,
        "every stage on a real model, ending in a table and a picture",
        "flextron demo --parent tiny",
    )
    d.add_argument(
        "--parent", default="smollm2", help="tiny, smollm2, stories260k, a model directory or a hub id"
    )
    d.add_argument("--out", help="output folder; default demo-out/PARENT")
    _data(d)
    d.add_argument("--seed", type=_seed, default=0)
    return parser


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="TEXT",
        help="file or folder (.txt, .md, .jsonl, .json, .csv, .parquet; also .xz, .gz, .zst), - for standard input, "
        "or hf:owner/name[split]; default: Python's documentation",
    )
    parser.add_argument(
        "--field", help='of --data: the column or key that holds the text; default "text", or the only one'
    )


def _fetch(args: argparse.Namespace) -> None:
    """Let the directory of a command that only reads it be a hub id too."""
    from flextron.checkpoint.hub import local

    args.directory = str(local(args.directory))


def _join_field(args: argparse.Namespace) -> None:
    """Make of --data and --field what the stages take."""
    if getattr(args, "field", None) is None:
        return
    if args.data is None:
        raise ValueError(f"{args.command}: --field must be given with --data, got no --data")
    from flextron.data import Text

    args.data = Text(args.data, args.field)


def _dtype(parser: argparse.ArgumentParser, auto: str) -> None:
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help=f"what weights are stored in; auto: {auto}",
    )


def _pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pack",
        choices=("same", "int8"),
        help="lay the weights out for a CPU first, as they are or as 8-bit integers",
    )


def _budget(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--budget", type=_float, help="fraction of the full model's latency; 1 when none is given"
    )
    group.add_argument("--latency-ms", type=_float)
    group.add_argument("--tokens-per-s", type=_float)
    group.add_argument("--params", type=_float)
    group.add_argument("--memory-gb", type=_float, help="weights and key/value cache")
    parser.add_argument(
        "--phase", choices=("prefill", "decode"), default="prefill", help="whose latency is meant"
    )
    parser.add_argument("--context", type=_count, help="tokens of the cache that --memory-gb counts")
    parser.add_argument("--batch", type=_count, help="sequences of that cache")


def _at_least(least: int, value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = None
    if number is None or number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {value}")
    return number


def _count(value: str) -> int:
    return _at_least(1, value)


def _number(value: str) -> int:
    return _at_least(0, value)


def _seed(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {value}") from None


def _float(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a number, got {value}")
    return number


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(","))


def _ints(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, got {value}") from None


def _floats(value: str) -> tuple[float, ...]:
    try:
        return tuple(_float(part) for part in value.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, got {value}") from None


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui

    with ui.reporter() as progress:
        report = pipeline.convert(
            args.source,
            args.directory,
            data=args.data,
            samples=args.samples,
            length=args.length,
            progress=progress,
            unit=args.unit,
            aggregate=args.aggregate,
            order=args.order,
            mlp_choices=args.mlp_choices,
            head_choices=args.head_choices,
            seed=args.seed,
            dtype=args.dtype,
            strip_prefix=args.strip_prefix,
            force=args.force,
        )
    _say(args, f"{args.directory}: {_certified(report)}")
    return report


def _certified(report: dict[str, Any]) -> str:
    """What a conversion proved, in one sentence."""
    parity = report["parity"]
    widest = max(s["max_rel"] for s in parity["sub_networks"])
    return (
        f"stored in {_dtypes(report['dtypes'])}; read back as {parity['dtype']} by stock transformers, within "
        f"{parity['max_rel']:.1e} of the parent's largest logit{_rounding(parity)}; "
        f"{len(parity['sub_networks'])} sub-networks within {widest:.1e} of plain models"
    )


def _rounding(parity: dict[str, Any]) -> str:
    """How much of a certificate's figure is that of a narrower dtype, where one was asked for."""
    rounding = parity["rounding"]["max_rel"]
    return f" ({rounding:.1e} of it from rounding)" if rounding else ""


def _dtypes(counts: dict[str, int]) -> str:
    """``bfloat16``, or with several ``bfloat16 (21 tensors), float32 (7)``."""
    if len(counts) == 1:
        return next(iter(counts))
    (first, count), *others = counts.items()
    return ", ".join([f"{first} ({count} tensors)", *(f"{name} ({n})" for name, n in others)])


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui
    from flextron.recipes import TrainConfig

    names = (
        "steps",
        "batch_size",
        "length",
        "accumulation",
        "learning_rate",
        "cross_entropy",
        "distillation",
    )
    names += ("full_probability", "eval_every", "checkpoint_every", "seed")
    config = TrainConfig(**{name: getattr(args, name) for name in names})
    with ui.reporter() as progress:
        report = pipeline.train(
            args.directory, config, data=args.data, restart=args.restart, dtype=args.dtype, progress=progress
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
    _say(args, f"{args.directory}: trained on {report.tokens} tokens, {report.seconds:.0f} s in this run")
    return {
        "tokens": report.tokens,
        "seconds": report.seconds,
        "resumed_from": report.resumed_from,
        "losses": report.losses,
        "evaluations": report.evaluations,
    }


def _tune(args: argparse.Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui
    from flextron.recipes import TuneConfig

    names = (
        "steps",
        "batch_size",
        "length",
        "accumulation",
        "learning_rate",
        "router_rate",
        "gates",
        "latency_weight",
        "cross_entropy",
        "distillation",
        "full_probability",
        "eval_every",
        "checkpoint_every",
        "seed",
    )
    config = TuneConfig(**{name: getattr(args, name) for name in names})
    with ui.reporter() as progress:
        report = pipeline.tune(
            args.directory,
            config,
            adaptive=args.adaptive,
            data=args.data,
            restart=args.restart,
            progress=progress,
        )
    _say(args, f"{args.directory}: tuned on {report.tokens} tokens, {report.seconds:.0f} s in this run")
    return {
        "tokens": report.tokens,
        "seconds": report.seconds,
        "resumed_from": report.resumed_from,
        "losses": report.losses,
        "evaluations": report.evaluations,
    }


def _profile(args: argparse.Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui
    from flextron.artefacts.latency_table import Workload

    workloads = []
    if args.phase != "decode":
        workloads.append(Workload.prefill(args.length, batch=args.batch))
    if args.phase != "prefill":
        workloads.append(Workload.decode(args.context, batch=args.batch))
    with ui.reporter() as progress:
        tables = pipeline.profile(
            args.directory, workloads, rounds=args.rounds, seed=args.seed, progress=progress
        )
    rows = [
        [
            name,
            f"{t.full_ms:.1f}",
            f"{t.smallest_ms:.1f}",
            f"{100 * t.residual_median:.1f} %",
            f"{100 * t.residual_worst:.1f} %",
        ]
        for name, t in tables.items()
    ]
    if not args.json:
        header = ["phase", "full ms", "smallest ms", "median error", "worst error"]
        ui.print_table("latency, and error on configurations not fitted", header, rows)
        for table in tables.values():
            for warning in table.warnings:
                _warn(warning)
    return {name: table.to_dict() for name, table in tables.items()}


def _route(args: argparse.Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui
    from flextron.recipes import RouteConfig

    if args.adaptive:
        return _route_adaptive(args)
    if args.gates:
        raise ValueError("route: --gates must be given with --adaptive only")
    names = ("form", "evaluations", "prefill", "steps", "targets", "seed")
    config = RouteConfig(**_set(args, names))
    with ui.reporter() as progress:
        result = pipeline.route(
            args.directory, config, **_set(args, ("data", "phase", "samples", "length")), progress=progress
        )
    if not args.json:
        header = ["target", "routed", "uniform", "searched (surrogate)"]
        rows = [
            [
                f"{t.target:.2f}",
                f"{t.routed_observed:+.3f}",
                f"{t.uniform_observed:+.3f}",
                f"{t.search_loss:+.3f}",
            ]
            for t in result.targets
        ]
        ui.print_table("loss above the full model's, nats", header, rows)
        _say_fit(result.surrogate, result.gate)
    return result.to_dict()


def _say_fit(fit: Any, gate: Any) -> None:
    """How far to trust a surrogate, where one was there."""
    if fit is None:
        return
    print(
        f"surrogate on {fit.n} held-out configurations: R² {fit.r2:.3f}, rank {fit.rank:.3f}, worst error "
        f"{fit.worst_error:.3f} nats at {fit.worst_fraction:.2f}"
    )
    if not gate.passed:
        _warn(
            f"{gate.steps_above} router steps were taken with the surrogate's error at or above {gate.threshold} nats"
        )


def _route_adaptive(args: argparse.Namespace) -> dict[str, Any]:
    from flextron import pipeline, ui
    from flextron.recipes import AdaptiveConfig

    if args.evaluations is not None:
        raise ValueError(
            "route: --evaluations must not be given with --adaptive, which asks for one in each step"
        )
    if args.prefill is not None and args.form != "surrogate":
        raise ValueError("route: --prefill must be given with --adaptive only for --form surrogate")
    config = AdaptiveConfig(**_set(args, ("form", "prefill", "steps", "targets", "gates", "seed")))
    with ui.reporter() as progress:
        result = pipeline.route_adaptive(
            args.directory, config, **_set(args, ("data", "phase", "samples", "length")), progress=progress
        )
    if not args.json:
        header = ["target", "of full (table)", "loss", "static of full", "static loss"]
        rows = [
            [
                f"{t.target:.2f}",
                f"{t.fraction:.3f}",
                f"{t.loss:.3f}",
                f"{t.static_fraction:.3f}",
                f"{t.static_loss:.3f}",
            ]
            for t in result.targets
        ]
        ui.print_table(f"sequences not trained on; full model {result.full_loss:.3f} nats", header, rows)
        _say_fit(result.surrogate, result.gate)
    return result.to_dict()


def _set(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options that were given, or have a default."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _loaded(args: argparse.Namespace) -> Any:
    from flextron.inference import from_pretrained
    from flextron.nn.packed import pack

    _fetch(args)
    model = from_pretrained(args.directory)
    if args.pack:
        pack(model, None if args.pack == "same" else args.pack)
    return model


def _eval(args: argparse.Namespace) -> list[dict[str, Any]]:
    from flextron import ui
    from flextron.checkpoint.hf import read_tokenizer
    from flextron.corpus import held_out_windows
    from flextron.judge.budgets import judge_budgets

    if args.tasks:
        return _eval_tasks(args)
    for name in ("limit", "data_dir"):
        if getattr(args, name) is not None:
            raise ValueError(f"eval: --{name.replace('_', '-')} must be given with --tasks only")
    model = _loaded(args)
    model.planner.table(args.phase)
    tokens = held_out_windows(read_tokenizer(args.directory), args.data, args.samples, args.length)
    below = [b for b in args.budgets if b != 1]
    with ui.reporter() as progress:
        found = judge_budgets(
            model,
            tokens,
            below,
            phase=args.phase,
            adaptive=args.adaptive,
            rounds=args.rounds,
            progress=progress,
        )
    if not args.json:
        ui.print_budgets("held-out loss and measured latency", found)
    return found


def _eval_tasks(args: argparse.Namespace) -> list[dict[str, Any]]:
    from flextron import ui
    from flextron.checkpoint.hf import read_tokenizer
    from flextron_lab import tasks
    from flextron_lab.demo import stories

    if args.data is not None:
        raise ValueError(
            "eval: --data must be given without --tasks, which have a text of their own, got both"
        )
    folder = Path(args.data_dir) if args.data_dir else stories.data_folder() / "benchmarks"
    tasks.check(args.tasks, folder)
    model = _loaded(args)
    with ui.reporter() as progress:
        found = tasks.evaluate(
            model,
            read_tokenizer(args.directory),
            args.tasks,
            args.budgets,
            folder,
            adaptive=args.adaptive,
            limit=args.limit,
            progress=progress,
        )
    if not args.json:
        metrics = [m for m in ("acc", "acc_norm", "perplexity") if any(m in row for row in found)]
        rows = [
            [
                row["task"],
                f"{row['budget']:.2f}",
                *(f"{row[m]:.3f}" if m in row else "" for m in metrics),
                str(row["n"]),
            ]
            for row in found
        ]
        ui.print_table("benchmarks by budget", ["task", "budget", *metrics, "questions"], rows)
    return found


def _report(args: argparse.Namespace) -> dict[str, Any]:
    from flextron import ui
    from flextron_lab.report import report

    with ui.reporter() as progress:
        path = report(
            args.directory,
            data=args.data,
            budgets=args.budgets,
            samples=args.samples,
            length=args.length,
            rounds=args.rounds,
            progress=progress,
        )
    _say(args, str(path))
    return {"page": str(path)}


def _reproduce(args: argparse.Namespace) -> dict[str, Any]:
    from flextron import ui
    from flextron_lab.study.results import write
    from flextron_lab.study.run import STAGES, Study

    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    with ui.reporter() as progress:
        studies = [Study(parent, Path(args.out) / parent, args.seeds, progress) for parent in args.parents]
        finished = [study.run(args.stages or STAGES, deadline) for study in studies]
    written = write(studies, args.out)
    if not all(finished):
        _say(args, "not finished: call again to go on")
    for path in written:
        _say(args, str(path))
    return {"finished": all(finished), "files": [str(path) for path in written]}


def _given(args: argparse.Namespace) -> dict[str, Any]:
    budgets = {name: getattr(args, name) for name in ("latency_ms", "tokens_per_s", "params", "memory_gb")}
    given = {name: value for name, value in budgets.items() if value is not None}
    return given or {"fraction": 1.0 if args.budget is None else args.budget}


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    from flextron.checkpoint.hf import read_tokenizer
    from flextron.inference import generate

    model = _loaded(args)
    where = {"phase": args.phase, "context": args.context, "batch": args.batch}
    found = model.set_budget(**_given(args), **where, adaptive=args.adaptive)
    said = generate(model, read_tokenizer(args.directory), args.prompt, args.max_new_tokens)
    _say(args, said)
    if args.adaptive:
        return {"text": said, "fraction": found}
    return {"text": said, "params": model.elastic.params(found), "mlp": found.mlp, "heads": found.heads}


def _export(args: argparse.Namespace) -> dict[str, Any]:
    from flextron.checkpoint.hf import read_tokenizer
    from flextron.exporting import export
    from flextron.inference import from_pretrained

    _fetch(args)
    model = from_pretrained(args.directory)
    widths = model.set_budget(**_given(args), phase=args.phase, context=args.context, batch=args.batch)
    tokenizer = read_tokenizer(args.directory)
    report = export(
        model, args.out, widths, layout=args.layout, tokenizer=tokenizer, dtype=args.dtype, force=args.force
    )
    parity = report["parity"]
    _say(
        args,
        f"{args.out}: {report['params']} parameters, {report['layout']}, stored in {_dtypes(report['dtypes'])}; "
        f"read back within {parity['max_rel']:.1e} of the elastic model's largest logit{_rounding(parity)}",
    )
    if report.get("note"):
        _say(args, report["note"])
    return report


def _info(args: argparse.Namespace) -> dict[str, Any]:
    from flextron import ui
    from flextron.artefacts.directory import ElasticDirectory
    from flextron.nn.storage import common, counted, name_of

    _fetch(args)
    with ElasticDirectory.open(args.directory) as checkpoint:
        model, meta, tables = checkpoint.model(), checkpoint.meta, checkpoint.tables
        routers, adaptive = checkpoint.static(), checkpoint.adaptive()
    config = model.elastic
    facts = {
        "family": config.family,
        "layers": config.num_layers,
        "mlp choices": list(config.mlp_choices),
        f"head choices ({config.unit})": list(config.head_choices),
        "parameters, full": config.params(config.full()),
        "parameters, smallest": config.params(config.smallest()),
        "stored in": counted(model.stored),
        "stock transformers loads": name_of(common(model.stored.values())),
        **_parity_facts(meta),
        "latency tables": {n: f"{t.smallest_ms:.1f} .. {t.full_ms:.1f} ms" for n, t in tables.items()},
        "routers": f"trained for {routers.phase}" if routers else "none",
        "adaptive router": f"trained for {adaptive.phase}" if adaptive else "none",
    }
    if not args.json:
        ui.print_table(
            str(args.directory), ["what", "value"], [[name, _shown(value)] for name, value in facts.items()]
        )
    return facts


def _shown(value: Any) -> str:
    """A fact as a reader wants it: {"float32": 272} is 272 x float32, figures of a proof have two digits."""
    if isinstance(value, dict):
        parts = [f"{n} × {name}" if isinstance(n, int) else f"{name} {n}" for name, n in value.items()]
        return ", ".join(parts) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    if value is None:
        return "not known"
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _parity_facts(meta: dict[str, Any]) -> dict[str, Any]:
    """What ``info`` says of the certificate, and of which weights it is."""
    parity = meta.get("parity", {})
    now = parity.get("weights") == meta["checksums"]["model.safetensors"]
    return {
        "parity": parity.get("max_rel"),
        "parity is of": "these weights" if now else "the weights before they were trained or saved again",
        "parity, rounding alone": (parity.get("rounding") or {}).get("max_rel"),
        "parity of sub-networks": [proven["max_rel"] for proven in parity.get("sub_networks") or ()],
    }


def _clean(args: argparse.Namespace) -> dict[str, Any]:
    from flextron import pipeline

    found = pipeline.clean(args.directory, unfinished=args.unfinished, dry_run=args.dry_run)
    total = sum(found.values())
    for path, size in found.items():
        _say(args, f"{path}: {size} bytes")
    _say(
        args,
        f"{args.directory}: {'would free' if args.dry_run else 'freed'} {total} bytes in {len(found)} files",
    )
    return {"files": found, "bytes": total, "dry_run": args.dry_run}


def _demo(args: argparse.Namespace) -> dict[str, Any] | list[dict[str, Any]]:
    from flextron import ui
    from flextron_lab.demo.parents import tiny_parents
    from flextron_lab.demo.run import run

    out = Path(args.out or Path("demo-out") / Path(args.parent).name)
    # "tiny" also takes the real small model where its data is
    parents = tiny_parents() if args.parent == "tiny" else (args.parent,)
    reports = []
    for parent in parents:
        folder = out if parent == parents[0] else out / parent
        with ui.reporter() as progress:
            found = run(parent, folder, data=args.data, seed=args.seed, progress=progress)
        reports.append(found)
        if args.json:
            continue
        ui.print_budgets(f"{found['parent']}: {found['workload']}", found["budgets"])
        table, fit, gate = found["table"], found["surrogate"], found["gate"]
        print(
            f"parity {found['parity']['max_rel']:.1e}; latency table error median "
            f"{100 * table['residual_median']:.1f} %, worst {100 * table['residual_worst']:.1f} %; "
            f"surrogate R² {fit['r2']:.3f}, rank {fit['rank']:.3f}, {gate['steps_below']} of "
            f"{gate['steps_below'] + gate['steps_above']} router steps below its gate of {gate['threshold']} nats; "
            f"{found['seconds']['total']:.0f} s"
        )
        print((folder / "sample.txt").read_text(encoding="utf-8"))
        print(f"{folder}: elastic/ extracted/ report.json report.png sample.txt\n")
    return reports[0] if len(reports) == 1 else reports


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        print(text)


if __name__ == "__main__":
    sys.exit(main())
