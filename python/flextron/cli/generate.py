"""Continue a prompt at a budget."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli import values
from flextron.cli.printing import say

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
    add("--prompt", required=True, help="text to continue")
    add("--max-new-tokens", type=values.count, default=64, help="number of tokens to add at most")
    shared.pack(parser)
    shared.placed(parser)


def run(args: Namespace) -> dict[str, Any]:
    from flextron.checkpoint.hf import read_tokenizer
    from flextron.inference import generate

    directory, model = shared.loaded(args)
    found = model.set_budget(**shared.budget_of(args), adaptive=args.adaptive)
    drafts = {"draft_budget": args.draft_budget, "draft_tokens": args.draft_tokens}
    text = generate(model, read_tokenizer(directory), args.prompt, args.max_new_tokens, **drafts)
    say(args, text)
    if args.adaptive:
        return {"text": text, "fraction": found}
    return {"text": text, "params": model.elastic.params(found), **found.to_dict()}
