"""Measure held-out loss and latency at a list of budgets, try these as drafts, or run benchmarks there."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli import packing, values
from flextron.cli.discovery import extension

EXAMPLE = "flextron eval elastic/ --budgets 0.5,0.75,1"


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    shared.checkpoint(parser)
    shared.data(parser)
    shared.budgets(parser, (0.5, 0.75, 1.0))
    add(
        "--adaptive",
        action="store_true",
        help="judge the adaptive router too, which chooses widths for every token",
    )
    add(
        "--draft",
        action="store_true",
        help="measure the budgets as drafts of the full model's tokens instead: how many of these are accepted, and "
        "tokens per second with a draft and without, after prompts of 8 tokens and of --length",
    )
    add(
        "--max-new-tokens",
        type=values.count,
        help="tokens to generate of each prompt with --draft; 64 by default",
    )
    shared.phase(parser, "phase whose latency is measured, and is meant by the budgets")
    shared.workload(parser)
    shared.judged(parser, rounds=7)
    add(
        "--tasks",
        type=values.names,
        metavar="T,T,..",
        help="benchmarks to run instead, through lm-evaluation-harness: arc_easy, hellaswag, lambada_openai, mmlu, "
        "piqa, winogrande",
    )
    add(
        "--limit",
        type=values.count,
        help="number of questions to draw of each of the --tasks, always the same ones; all by default",
    )
    add(
        "--data-dir",
        metavar="DIR",
        help="folder that holds the files of --tasks; $FLEXTRON_DATA/benchmarks by default",
    )
    shared.accept_noise(parser)
    packing.pack(parser)
    shared.placed(parser)


def run(args: Namespace) -> list[dict[str, Any]]:
    from flextron import ui
    from flextron.artefacts.directory import check_length
    from flextron.artefacts.planner import planner_of
    from flextron.checkpoint.hf import read_tokenizer
    from flextron.corpus import held_out_windows
    from flextron.judge.budgets import judge_budgets

    if args.tasks:
        return extension("eval.tasks", "eval: --tasks").run(args)
    for name in ("limit", "data_dir"):
        if getattr(args, name) is not None:
            raise ValueError(f"eval: --{name.replace('_', '-')} must be given with --tasks only")
    if args.draft:
        return _drafts(args)
    if args.max_new_tokens is not None:
        raise ValueError("eval: --max-new-tokens must be given with --draft only")
    text = packing.read_text(args)
    directory, model = packing.loaded(args, text)
    check_length("eval", args.length, model.config, "--length")
    table = planner_of(model).table(args.phase, batch=args.batch, context=args.context)
    if table.doubt:
        shared.doubted(args)(table.doubt)
    tokens = held_out_windows(read_tokenizer(directory), text, args.samples, args.length)
    with ui.reporter() as progress:
        found = judge_budgets(
            model,
            tokens,
            [b for b in args.budgets if b != 1],
            phase=args.phase,
            batch=args.batch,
            context=args.context,
            adaptive=args.adaptive,
            rounds=args.rounds,
            progress=progress,
        )
    if not args.json:
        ui.print_budgets("held-out loss and measured latency", found)
    return found


def _drafts(args: Namespace) -> list[dict[str, Any]]:
    from flextron import ui
    from flextron.artefacts.directory import check_length
    from flextron.artefacts.planner import planner_of
    from flextron.checkpoint.hf import read_tokenizer
    from flextron.corpus import held_out_windows
    from flextron.judge.drafting import judge_drafts

    if args.adaptive:
        raise ValueError(
            "eval: --draft must be given without --adaptive, for a draft is a static budget, got both"
        )
    count, text = args.max_new_tokens or 64, packing.read_text(args)
    directory, model = packing.loaded(args, text)
    check_length("eval", args.length + count, model.config, "--length and --max-new-tokens")
    table = planner_of(model).table("decode", batch=args.batch, context=args.context)
    if table.doubt:
        shared.doubted(args)(table.doubt)
    tokens = held_out_windows(read_tokenizer(directory), text, args.samples, args.length)
    prompts = {f"{n} tokens": tokens[:, :n] for n in sorted({min(8, args.length), args.length})}
    with ui.reporter() as progress:
        found = judge_drafts(
            model,
            prompts,
            [b for b in args.budgets if b != 1],
            tokens=count,
            batch=args.batch or 1,
            rounds=args.rounds,
            progress=progress,
        )
    if not args.json:
        ui.print_drafts("greedy tokens of the full model", found)
    return found
