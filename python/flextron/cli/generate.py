"""Continue a prompt at a budget."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from flextron.cli import options as shared
from flextron.cli import packing, values
from flextron.cli.printing import say

if TYPE_CHECKING:  # the help needs no torch
    from flextron.nn.deadline import Held

EXAMPLE = 'flextron generate elastic/ --budget 0.6 --prompt "Once"'


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    shared.checkpoint(parser)
    shared.budget(parser)
    add("--adaptive", action="store_true", help="let the adaptive router choose widths for every token")
    add(
        "--draft-budget",
        type=values.real,
        help="smaller budget, a fraction of the full model's decode latency, that proposes tokens for the budget to "
        "verify: the same text, faster",
    )
    add(
        "--draft-tokens",
        type=values.count,
        help="number of tokens to propose at once; as many as pay by default",
    )
    add(
        "--hold",
        action="store_true",
        help="make --latency-ms with --phase decode a deadline for every token: budgets change as steps are measured",
    )
    add(
        "--deadline-ms",
        type=values.real,
        help="milliseconds that the whole generation may take, held in the same way",
    )
    add(
        "--floor",
        type=values.real,
        help="fraction of the full model's latency that --hold and --deadline-ms must not fall below",
    )
    add("--prompt", required=True, help="text to continue")
    add("--max-new-tokens", type=values.count, default=64, help="number of tokens to add at most")
    packing.pack(parser)
    shared.data(parser)
    shared.placed(parser)


def run(args: Namespace) -> dict[str, Any]:
    from flextron.checkpoint.hf import read_tokenizer
    from flextron.inference import generate

    budgets = shared.given(args, "budget", "latency_ms", "tokens_per_s", "params", "memory_gb")
    if args.deadline_ms is not None and (budgets or args.adaptive):
        raise ValueError(
            "generate: --deadline-ms must be given without another budget, got "
            f"--{next(iter(budgets), 'adaptive').replace('_', '-')}"
        )
    calibration = packing.read_text(args)
    if args.calibrate is None and calibration is not None:
        raise ValueError("generate: --data must be given with --calibrate only, got no --calibrate")
    directory, model = packing.loaded(args, calibration)
    held = {"deadline_ms": args.deadline_ms, "floor": args.floor} if args.deadline_ms is not None else {}
    hold = {"hold": args.hold, "floor": args.floor} if not held else {}
    found = model.set_budget(**shared.budget_of(args), adaptive=args.adaptive, **hold)
    drafts = {"draft_budget": args.draft_budget, "draft_tokens": args.draft_tokens}
    text = generate(model, read_tokenizer(directory), args.prompt, args.max_new_tokens, **drafts, **held)
    say(args, text)
    if args.hold or held:
        say(args, _kept(model.held))
        return {"text": text, **model.held.to_dict()}
    if args.adaptive:
        return {"text": text, "fraction": found}
    return {"text": text, "params": model.elastic.params(found), **found.to_dict()}


def _kept(held: Held) -> str:
    """How a deadline was kept, in one line."""
    low, high = (end(token.fraction for token in held.tokens) for end in (min, max))
    budgets = f"budgets from {low:.2f} to {high:.2f}, {held.fraction:.2f} in the mean"
    if held.deadline_ms is not None:
        return f"{held.total_ms:.0f} of {held.deadline_ms:g} ms for {len(held.tokens)} tokens; {budgets}"
    return f"{held.within:.0%} of {len(held.tokens) - 1} steps within {held.latency_ms:g} ms; {budgets}"
