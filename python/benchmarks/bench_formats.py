"""How fast the formats of packed weights are, beside one another and llama.cpp: python bench_formats.py elastic/

The same network in every format, prompts and greedy decoding, at full width and at others; llama.cpp runs the full one
as a GGUF file, if xllamacpp is installed. All take turns, in the opposite order in every round. Rates are those of the
fastest round, for what else runs only ever makes a round slower; spreads are (slowest - fastest) / fastest.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from bench_model import generation, of_llama_cpp, taking_turns, widths_of
from gpu_contestants import Run, Times, at_width
from llama_cpp_rival import LlamaCpp

import flextron
from flextron.exporting import export_gguf
from flextron.judge.timing import wait_until_idle

FORMATS = ("bfloat16", "int8", "w8a8", "int4")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("directory", help="elastic checkpoint")
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMATS))
    parser.add_argument("--widths", type=lambda text: [float(w) for w in text.split(",")], default=[1.0, 0.5])
    parser.add_argument("--types", type=lambda text: text.split(","), default=["q4_0"], help="of GGUF files")
    parser.add_argument(
        "--gguf", type=Path, default=Path("."), help="folder of these; one that is there is kept"
    )
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=16, help="tokens that are decoded after the first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-wait", action="store_true", help="time at once, whatever else runs")
    return parser.parse_args(arguments)


def contestants(args: argparse.Namespace) -> dict[tuple[float, str], Run]:
    """(width, who) -> a run."""
    runs: dict[tuple[float, str], Run] = {}
    model: Any = flextron.from_pretrained(args.directory, torch.bfloat16, device="cpu")
    ids = torch.randint(model.config.vocab_size, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    if importlib.util.find_spec("xllamacpp") is None:
        print("bench_formats: xllamacpp is not installed, so there is no llama.cpp beside the others")
        args.types = []
    for kind in args.types:
        path = args.gguf / f"{kind}.gguf"
        if not path.exists():
            export_gguf(model, path, model.elastic.full(), kind=kind)
        rival = LlamaCpp(path, torch.get_num_threads(), args.prompt + args.new + 64)
        runs[1.0, f"llama.cpp, {kind}"] = of_llama_cpp(rival, ids, args.new)
    for format in args.formats:
        packed: Any = flextron.from_pretrained(args.directory, torch.bfloat16, device="cpu")
        flextron.pack(packed, None if format == "bfloat16" else format)
        for share in args.widths:
            run = generation(packed, ids, args.new)
            runs[share, f"flextron, {format}"] = at_width(run, packed, widths_of(packed, share))
    return runs


def show(args: argparse.Namespace, samples: dict[tuple[float, str], list[Times]]) -> None:
    rates: dict[tuple[str, str, float], float] = {}
    print(f"{'':24}{'width':>6}{'prefill, tokens/s':>24}{'decode, tokens/s':>24}")
    for (share, who), times in sorted(samples.items(), key=lambda item: (item[0][1], -item[0][0])):
        cells = ""
        for phase, tokens, own in (
            ("prefill", args.prompt, [t for t, _ in times]),
            ("decode", 1, [t for _, t in times]),
        ):
            rate = rates[phase, who, share] = tokens / min(own)
            cells += f"{rate:16.1f} (+{max(own) / min(own) - 1:4.0%})"
        print(f"{who:24}{share:6g}{cells}")
    for (phase, who, share), rate in sorted(rates.items()):
        rivals = [
            f"{rate / theirs:.2f} of {rival}"
            for (part, rival, width), theirs in rates.items()
            if (part, width) == (phase, share) and rival != who
        ]
        narrow = f"; {rate / rates[phase, who, 1.0]:.2f} of its full width" if share != 1 else ""
        print(f"{phase} of {who} at {share:g}: {', '.join(rivals)}{narrow}")


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    args = parse()
    with torch.no_grad():
        runs = contestants(args)
        if not args.no_wait:
            wait_until_idle()
        show(args, taking_turns(runs, args.rounds))


if __name__ == "__main__":
    main()
