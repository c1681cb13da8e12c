"""How much faster a budget is in llama.cpp, beside how much it is here: python bench_llama_cpp.py elastic/

The full network and the one of the budget are exported as GGUF files; llama.cpp and flextron, its weights packed,
decode greedily with both. All four take turns, in the opposite order in every round. Rates are those of the fastest
round, for what else runs only ever makes a round slower; spreads are (slowest - fastest) / fastest. Needs xllamacpp.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from bench_model import generation, of_llama_cpp, taking_turns
from gpu_contestants import at_width
from llama_cpp_rival import LlamaCpp

import flextron
from flextron.exporting import export_gguf
from flextron.judge.timing import wait_until_idle

# what a GGUF file holds -> how the same weights are packed here
_PACKED = {"f32": torch.float32, "bf16": torch.bfloat16, "q8_0": "int8", "q4_0": "int4"}
_FULL, _SMALL = 1.0, 0.5  # keys of `taking_turns`, whatever the budget


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("directory", help="elastic checkpoint, profiled")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--type", choices=_PACKED, default="q8_0", help="of the weights, in both")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64, help="tokens that are decoded after the first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-wait", action="store_true", help="time at once, whatever else runs")
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> dict[tuple[str, str], dict[float, tuple[float, float]]]:
    """(phase, who) -> network -> tokens per second and spread."""
    dtype = _PACKED[args.type]
    model: Any = flextron.from_pretrained(args.directory, torch.float32, device="cpu")
    small = model.set_budget(args.budget)
    networks = {_FULL: model.elastic.full(), _SMALL: small}
    ids = torch.randint(model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        runs, hosts = {}, []
        for key, widths in networks.items():
            path = Path(temporary) / f"{key}.gguf"
            report = export_gguf(model, path, widths, kind=args.type)
            print(f"{report['layout']} in {report['architecture']}: {report['params']} parameters")
            hosts.append(LlamaCpp(path, torch.get_num_threads(), args.prompt + args.new + 64))
            runs[key, "llama.cpp"] = of_llama_cpp(hosts[-1], ids, args.new)
        if isinstance(dtype, torch.dtype):
            model.to(dtype)
        flextron.pack(model, dtype=None if isinstance(dtype, torch.dtype) else dtype)
        for key, widths in networks.items():
            runs[key, "flextron"] = at_width(generation(model, ids, args.new), model, widths)
        if not args.no_wait:
            wait_until_idle()
        samples = taking_turns(runs, args.rounds)
        for host in hosts:
            host.close()
    found: dict[tuple[str, str], dict[float, tuple[float, float]]] = {}
    for (key, who), times in samples.items():
        for phase, tokens, own in (
            ("prefill", args.prompt, [t for t, _ in times]),
            ("decode", 1, [t for _, t in times]),
        ):
            best = min(own)
            found.setdefault((phase, who), {})[key] = (tokens / best, max(own) / best - 1)
    return found


def show(found: dict[tuple[str, str], dict[float, tuple[float, float]]]) -> None:
    print(f"{'':24}{'full, tokens/s':>20}{'budget, tokens/s':>20}{'speed-up':>10}")
    gains = {}
    for (phase, who), rates in sorted(found.items()):
        (full, apart), (small, apart_small) = rates[_FULL], rates[_SMALL]
        gains[phase, who] = small / full
        cells = f"{full:.1f} (+{apart:.0%})", f"{small:.1f} (+{apart_small:.0%})"
        print(f"{who + ', ' + phase:24}{cells[0]:>20}{cells[1]:>20}{small / full:10.2f}")
    for phase in ("decode", "prefill"):
        share = gains[phase, "llama.cpp"] / gains[phase, "flextron"]
        print(f"{phase}: the speed-up in llama.cpp is {share:.2f} of ours")


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    show(measure(parse()))


if __name__ == "__main__":
    main()
