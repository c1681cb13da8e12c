"""Tokens per second of an elastic checkpoint in vLLM, at budgets that take turns, and in flextron itself.

Run it in the environment of vLLM: bench_vllm.py elastic/ --budgets 1,0.5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("directory", help="elastic checkpoint with latency tables")
    parser.add_argument("--budgets", default="1,0.75,0.5", help="fractions of the full model's latency")
    parser.add_argument("--requests", type=int, default=8, help="requests at once")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the fastest of each counts")
    parser.add_argument("--stock", action="store_true", help="measure vLLM's own class of the parent instead")
    parser.add_argument("--dtype", default="float32", help="of weights in memory")
    return parser.parse_args(argv)


def engine(args: argparse.Namespace) -> Any:
    from vllm import LLM

    length, stock = args.prompt + args.tokens + 1, {}
    if args.stock:
        with open(f"{args.directory}/config.json") as file:
            stock = {"architectures": json.load(file)["architectures"]}
    return LLM(
        args.directory,
        dtype=args.dtype,
        max_model_len=length,
        max_num_seqs=args.requests,
        max_num_batched_tokens=max(2048, length),
        enable_prefix_caching=False,
        enforce_eager=True,
        hf_overrides=stock,
    )


def in_vllm(llm: Any, prompts: list[list[int]], tokens: int) -> Callable[[float], None]:
    """What takes the prompts through vLLM at a budget."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    given = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]

    def run(budget: float) -> None:
        own = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args={"budget": budget})
        llm.generate(given, own, use_tqdm=False)

    return run


def in_flextron(directory: str, dtype: str, prompts: list[list[int]], tokens: int) -> Callable[[float], None]:
    """The same by the decoder op, without the loop of `generate`, which wants a newer transformers than vLLM."""
    import flextron
    from flextron.nn import ElasticCache
    from flextron.nn.forward import ElasticForward

    model, ids = flextron.from_pretrained(directory, dtype), torch.tensor(prompts)
    step = ElasticForward.of(model)

    @torch.inference_mode()
    def run(budget: float) -> None:
        with model.budget(budget):
            cache, last, extents = ElasticCache(), ids, step.extents(model, len(ids))
            for _ in range(tokens):
                past = cache.get_seq_length()
                cos, sin = step.tables(step.norm, torch.arange(past, past + last.shape[1])[None])
                _, best = step(model, last, cos, sin, cache, None, 1, extents)
                last = best[:, None]

    return run


def main() -> None:
    args = parse()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else the engine is another process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 250) for _ in range(args.prompt)] for _ in range(args.requests)]
    hosts = {"vllm": in_vllm(engine(args), prompts, args.tokens)}
    budgets = [float(budget) for budget in args.budgets.split(",")]
    if args.stock:
        hosts, budgets = {"vllm stock": hosts["vllm"]}, [1.0]
    else:
        hosts["flextron"] = in_flextron(args.directory, args.dtype, prompts, args.tokens)
    fastest = {(host, budget): float("inf") for host in hosts for budget in budgets}
    for turn in range(args.rounds + 1):
        for host, budget in fastest:
            began = time.perf_counter()
            hosts[host](budget)
            if turn:  # the first warms up
                fastest[host, budget] = min(fastest[host, budget], time.perf_counter() - began)
    print(
        f"{args.requests} requests, {args.prompt} + {args.tokens} tokens, {torch.get_num_threads()} threads"
    )
    print(f"{'host':<12}{'budget':>8}{'tokens/s':>10}{'of full':>9}")
    for (host, budget), seconds in fastest.items():
        of_full = fastest[host, budgets[0]] / seconds
        print(f"{host:<12}{budget:>8g}{args.requests * args.tokens / seconds:>10.1f}{of_full:>9.2f}")


if __name__ == "__main__":
    sys.exit(main())
