"""Options that several commands share, beside what reads them; and options made from the fields of a recipe."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from typing import Any, TypeVar

from flextron.cli import values
from flextron.cli.printing import warn
from flextron.recipes import AdaptiveConfig, RouteConfig, TrainConfig

Recipe = TypeVar("Recipe", TrainConfig, RouteConfig, AdaptiveConfig)


def from_fields(parser: ArgumentParser, recipe: type[Any], names: Iterable[str]) -> None:
    """An option for each of these fields: name, type, limits, default and help are the field's."""
    known = {f.name: f for f in fields(recipe)}
    for name in names:
        _add(parser, known[name], known[name].metadata["text"], known[name].default)


def from_two(parser: ArgumentParser, static: type[Any], adaptive: type[Any], names: Iterable[str]) -> None:
    """The same of two recipes, of which ``--adaptive`` takes the second; what is not given is None."""
    first, second = ({f.name: f for f in fields(recipe)} for recipe in (static, adaptive))
    for name in names:
        f, other = first.get(name), second.get(name)
        if f is None or other is None:
            only = first.get(name) or second[name]
            when = "not" if other is None else "only"
            _add(
                parser,
                only,
                f"{only.metadata['text']} (default: {_shown(only.default)}; {when} with --adaptive)",
            )
            continue
        text, theirs = f.metadata["text"], other.metadata["text"]
        if theirs != text:
            text += f"; with --adaptive {theirs}"
        default = _shown(f.default)
        if other.default != f.default:
            default += f"; with --adaptive {_shown(other.default)}"
        _add(parser, f, f"{text} (default: {default})")


def _add(parser: ArgumentParser, f: Field[Any], text: str, default: Any = None) -> None:
    kind, _, rest = str(f.type).partition(" | ")
    if kind == "bool":  # either way where the default is neither
        action = BooleanOptionalAction if rest else "store_true"
        parser.add_argument(f"--{f.name.replace('_', '-')}", action=action, default=default, help=text)
        return
    least = 1 if f.metadata["positive"] else f.metadata["least"]
    types: dict[str, tuple[Callable[[str], Any], str | None]] = {
        "int": (values.whole if least is None else values.at_least(least), None),
        "float": (values.real, None),
        "str": (str, None),
        "tuple[float, ...]": (values.reals, "T,T,..,1"),
    }
    read, metavar = types[kind]
    parser.add_argument(
        f"--{f.name.replace('_', '-')}",
        type=read,
        default=default,
        choices=f.metadata["choices"] or None,
        metavar=metavar,
        help=text.replace("%", "%%"),
    )


def _shown(default: Any) -> str:
    return ",".join(f"{x:g}" for x in default) if isinstance(default, tuple) else str(default)


def taken(recipe: type[Recipe], args: Namespace) -> Recipe:
    """The recipe that a command line asks for: its own default in every field that was not given."""
    return recipe(**given(args, *(f.name for f in fields(recipe))))


def given(args: Namespace, *names: str) -> dict[str, Any]:
    """The named options that have a value."""
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def data(parser: ArgumentParser, written: bool = False) -> None:
    """What text a stage reads; ``written``: what the parent writes may be named, and is the default."""
    docs = "python:docs, Python's own documentation"
    default = f"{docs}, or parent:TOKENS, by default, what the parent writes, which stays in the checkpoint"
    parser.add_argument(
        "--data",
        metavar="TEXT",
        action="append",
        help="text to use: a folder that `flextron tokenize` has written, a file or folder (.txt, .md, .jsonl, .json, "
        ".csv, .parquet; also .xz, .gz, .zst), - for standard input, hf:owner/name[split], "
        f"{default if written else f'or {docs}, by default'}; given several times, a mixture",
    )
    parser.add_argument(
        "--weights",
        type=values.reals,
        metavar="W,W,..",
        help="shares of the tokens to draw from each --data; as many as each has, by default",
    )
    parser.add_argument(
        "--field",
        help='column or key of --data that holds the text, of every text that has some; "text", or the only one, by '
        "default",
    )


def text_of(args: Namespace) -> Any:
    """--data, --weights and --field, as the stages take them."""
    for name in ("field", "weights"):
        if getattr(args, name) is not None and args.data is None:
            raise ValueError(f"{args.command}: --{name} must be given with --data, got no --data")
    if args.data is None:
        return None
    texts = list(args.data)
    if args.field is not None:
        from flextron.corpus import may_name_a_field
        from flextron.documents import Text

        # in a mixture it is the field of the texts that have some; where none has, it is refused where they are read
        fielded = [one for one in texts if may_name_a_field(one)] or texts
        texts = [Text(one, args.field) if one in fielded else one for one in texts]
    if args.weights is None and len(texts) == 1:
        return texts[0]
    if args.weights is not None and len(args.weights) != len(texts):
        raise ValueError(
            f"{args.command}: --weights must be one number for each of the {len(texts)} --data, "
            f"got {len(args.weights)}"
        )
    from flextron.corpus import Mix

    return Mix(texts, args.weights)


_DTYPES = ("auto", "float32", "bfloat16", "float16")


def device(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=values.device,
        default="auto",
        metavar="DEVICE",
        help="where to compute: cpu, cuda, cuda:1 or another GPU; auto: the first GPU, else the CPU",
    )


def stored_dtype(parser: ArgumentParser, auto: str) -> None:
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="auto",
        help=f"dtype in which weights are stored; auto: {auto}",
    )


def memory_dtype(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype that weights have in memory while this runs, the checkpoint's stay; auto: the one they are stored "
        "in (default: auto on a GPU, float32 on a CPU)",
    )


def placed(parser: ArgumentParser) -> None:
    """Where a command that changes no weight holds them, and how."""
    device(parser)
    memory_dtype(parser)


def restart(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--restart", action="store_true", help="discard an unfinished run instead of resuming it"
    )


def judged(parser: ArgumentParser, rounds: int) -> None:
    """What losses and latencies of budgets are measured on."""
    parser.add_argument(
        "--samples",
        type=values.count,
        default=16,
        help="number of held-out sequences that losses are measured on",
    )
    parser.add_argument("--length", type=values.count, default=256, help="tokens in each of these sequences")
    parser.add_argument("--rounds", type=values.count, default=rounds, help="samples to take of each latency")


def budgets(parser: ArgumentParser, default: tuple[float, ...]) -> None:
    parser.add_argument(
        "--budgets",
        type=values.reals,
        default=default,
        metavar="B,B,..",
        help="budgets to set, as fractions of the full model's latency",
    )


def checkpoint(parser: ArgumentParser) -> None:
    parser.add_argument("directory", help="elastic checkpoint: a directory or a hub id")


def fetched(args: Namespace) -> str:
    """The directory of a command that only reads it: one here, or one that the hub gives."""
    from flextron.checkpoint.hub import local

    return str(local(args.directory))


def phase(parser: ArgumentParser, text: str) -> None:
    parser.add_argument("--phase", choices=("prefill", "decode"), default="prefill", help=text)


def budget(parser: ArgumentParser) -> None:
    """One budget of five kinds, and what it is counted for."""
    group = parser.add_mutually_exclusive_group()
    kinds = {
        "--budget": "fraction of the full model's latency that a forward may take; 1 when no budget is given",
        "--latency-ms": "milliseconds that a forward of the profiled workload may take",
        "--tokens-per-s": "tokens per second that a forward of the profiled workload must take in",
        "--params": "number of parameters that the sub-network may have",
        "--memory-gb": "gigabytes that weights and key/value cache may fill",
    }
    for name, text in kinds.items():
        group.add_argument(name, type=values.real, help=text)
    phase(parser, "phase whose latency the budget means")
    workload(parser, "; with --memory-gb, those that the cache has room for")
    machine(parser)


def workload(parser: ArgumentParser, more: str = "") -> None:
    """Which of the profiled workloads of a phase is meant."""
    for name, what in (
        ("--batch", "sequences side by side"),
        ("--context", "tokens in a prompt or in the cache"),
    ):
        text = f"{what} whose latency is meant: the nearest that was profiled, the fewest by default{more}"
        parser.add_argument(name, type=values.count, help=text)


def accept_noise(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--accept-noise",
        action="store_true",
        help="go on where the latency table may be wrong by more than 10 %%, which is refused by default",
    )


def doubted(args: Namespace) -> Callable[[str], None]:
    """What is called with a doubt about a latency table: it refuses, or warns where --accept-noise is given."""

    def say(doubt: str) -> None:
        if not args.accept_noise:
            raise ValueError(
                f"{args.command}: {doubt}; run `flextron profile {args.directory}` on a quiet machine, or go on with "
                "--accept-noise"
            )
        warn(doubt)

    return say


def machine(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--machine",
        metavar="NAME",
        help="machine whose latency is meant, as `flextron info` lists them; this one by default",
    )


def budget_of(args: Namespace) -> dict[str, Any]:
    """The one budget that was given, with its phase and cache."""
    one = given(args, "latency_ms", "tokens_per_s", "params", "memory_gb")
    one = one or {"fraction": 1.0 if args.budget is None else args.budget}
    chosen = {name: getattr(args, name) for name in ("phase", "batch", "context", "machine")}
    return one | chosen
