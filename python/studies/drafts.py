"""How often sub-networks draft what the full model says, and what steps of several tokens take on this CPU.

python python/studies/drafts.py DIR [--pack int8]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import thread_time

import torch

import flextron
from flextron.checkpoint.hf import read_tokenizer
from flextron.config import Widths
from flextron.nn import Elastic, ElasticCache

OPENINGS = (
    "The history of the Roman empire begins",
    "To install the package, run the following command",
    "Photosynthesis is the process by which",
    "Once upon a time there was a little girl",
    "The economy of a country depends on",
    "In physics, the force of gravity",
    "def fibonacci(n):",
    "A cell membrane is",
)
SAMPLES = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="elastic checkpoint")
    parser.add_argument("--pack", choices=("same", "int8"), default="int8")
    parser.add_argument(
        "--tokens", type=int, default=48, help="tokens to generate after each of eight openings"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # whose own time is taken, so that other programs hardly matter
    model = flextron.from_pretrained(args.directory, device="cpu")
    flextron.pack(model, None if args.pack == "same" else args.pack)
    config = model.elastic

    def uniform(mlp: int, heads: int) -> Widths:
        return Widths((mlp,) * config.num_layers, (heads,) * config.num_layers)

    networks = {
        (mlp, heads): uniform(mlp, heads) for mlp in config.mlp_choices for heads in config.head_choices
    }
    tokenizer = read_tokenizer(args.directory)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    prompts = tokenizer(list(OPENINGS), return_tensors="pt", padding=True, return_token_type_ids=False)
    settings = dict(
        max_new_tokens=args.tokens, do_sample=False, eos_token_id=-1, return_dict_in_generate=True
    )
    settings["pad_token_id"] = tokenizer.pad_token_id
    full = model.generate(**prompts, **settings)
    for (mlp, heads), widths in networks.items():
        drafted = model.generate(**prompts, draft_budget=widths, draft_tokens=2, **settings)
        share = config.params(widths) / config.params(config.full())
        same = "same tokens" if torch.equal(drafted.sequences, full.sequences) else "OTHER TOKENS"
        counts = drafted.drafted
        rate = f"{counts.acceptance:.3f} of {counts.proposed}"
        print(f"mlp {mlp} heads {heads}: {share:.3f} of the parameters, {rate}, {same}")
    steps = {f"full, {n} tokens": step(model, config.full(), n) for n in (1, 2, 3, 4, 5, 9)}
    steps |= {f"mlp {mlp} heads {heads}": step(model, w, 1) for (mlp, heads), w in networks.items()}
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(SAMPLES):
        for name, run in steps.items():
            run()
            began = thread_time()
            run()
            best[name] = min(best[name], thread_time() - began)
    for name, seconds in best.items():
        print(f"step of {name}: {1e3 * seconds:.2f} ms, {seconds / best['full, 1 tokens']:.2f}")


def step(model: Elastic, widths: Widths, count: int) -> Callable[[], None]:
    """A step of so many tokens after 128."""
    cache, ids = ElasticCache(), torch.randint(model.elastic.vocab_size, (1, 128 + count))
    model.set_widths(widths)
    with torch.no_grad():
        model(ids[:, :128], cache=cache, logits_to_keep=1)

    @torch.no_grad()
    def run() -> None:
        model.set_widths(widths)
        model(ids[:, 128:], cache=cache)
        cache.rewind(128)

    return run


if __name__ == "__main__":
    main()
