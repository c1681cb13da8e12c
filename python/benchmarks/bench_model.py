"""Tokens per second of generate() beside stock transformers and llama.cpp: python bench_model.py --dtype bfloat16

Greedy. The rivals hold the same weights. Stock transformers runs the full model and, at smaller widths, the plain model
that `flextron.extract` takes out; llama.cpp runs the same networks as GGUF files, if xllamacpp is installed. With
--device cuda the contestants are those of gpu_contestants.py. All take turns, in the opposite order in every round, and
figures are medians over rounds. "Ideal" is the bound on decode: the bytes of weights, and on a GPU of the cache, that a
step reads, over the read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import os
import subprocess
import tempfile
import warnings
from dataclasses import astuple, dataclass, fields
from math import nan
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import gpu_contestants as gpu
import torch
from bench_training import smollm2_shape
from gpu_contestants import Run, Times, at_width
from llama_cpp_rival import LlamaCpp
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

import flextron
from flextron.config import Widths
from flextron.exporting import export_gguf
from flextron.judge.timing import read_bandwidth, wait_until_idle
from flextron.nn import elastic_config, make_elastic

WIDTHS = (1.0, 0.75, 0.5, 0.25)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.bfloat16,
    "w8a8": torch.bfloat16,
    "int4": torch.bfloat16,
}  # the formats of panels that have scales: bfloat16 is what else there is
_GGUF = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "w8a8": "q8_0", "int4": "q4_0"}
_BYTES = {"int8": 1.0, "w8a8": 1.0, "int4": 5 / 8}  # of a weight, with its share of a scale


def llama_shape(hidden: int, neurons: int, layers: int, **more: Any) -> LlamaConfig:
    """The shape of a Llama 3: head size and vocabulary are the same in all."""
    shape = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=layers, **(shape | more)
    )


def llama1b_shape(layers: int) -> LlamaConfig:
    """Llama-3.2-1B, which has 16 layers."""
    return llama_shape(2048, 8192, layers, tie_word_embeddings=True)


MODELS = {
    "smollm2": lambda args: smollm2_shape(),
    "llama1b": lambda args: llama1b_shape(args.layers or (4 if args.device.type == "cpu" else 16)),
    "llama8b": lambda args: llama_shape(4096, 14336, args.layers or 32, tie_word_embeddings=False),
    "tiny": lambda args: llama_shape(
        64, 256, args.layers or 2, vocab_size=512, num_attention_heads=4, num_key_value_heads=4
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the CSV file. Rates are tokens per second; a spread is (largest - smallest) / median over rounds."""

    model: str
    dtype: str
    width: float
    who: str
    prefill: float
    prefill_spread: float
    decode: float
    decode_spread: float
    ideal_decode: float
    read_gb_s: float
    threads: int
    rounds: int
    machine: str
    commit: str
    batch: int = 1


class _Clock(StoppingCriteria):
    def __init__(self) -> None:
        self.times = [perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.times.append(perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def generation(model: object, ids: Tensor, new: int) -> Run:
    """Greedy generate() of a transformers model. The time of the prompt includes the first token."""
    mask = torch.ones_like(ids)

    def run() -> Times:
        clock = _Clock()
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new + 1,
            eos_token_id=None,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return clock.times[1] - clock.times[0], (clock.times[-1] - clock.times[1]) / new

    return run


def of_llama_cpp(rival: LlamaCpp, ids: Tensor, new: int) -> Run:
    prompt = ids.flatten().tolist()

    def run() -> Times:
        rival.reset()
        begin = perf_counter()
        token = int(rival.step(prompt).argmax())
        first = perf_counter()
        for _ in range(new):
            token = int(rival.step([token]).argmax())
        return first - begin, (perf_counter() - first) / new

    return run


def widths_of(model: object, share: float) -> Widths:
    c = model.elastic
    neurons = c.mlp_choices[round(len(c.mlp_choices) * share) - 1]
    groups = min(c.head_choices, key=lambda n: (abs(n / c.max_heads - share), n))
    return Widths((neurons,) * c.num_layers, (groups,) * c.num_layers)


def elastic_of(full: LlamaForCausalLM) -> object:
    """An elastic model on the weights of ``full``, at no cost of memory."""
    with torch.device("meta"):
        elastic = LlamaForCausalLM(copy.deepcopy(full.config)).eval()
    elastic.load_state_dict(full.state_dict(), assign=True)
    elastic.tie_weights()
    elastic.model.rotary_emb = full.model.rotary_emb
    return make_elastic(elastic, elastic_config(elastic))


def contestants(
    args: argparse.Namespace, folder: Path
) -> tuple[dict[tuple[float, str], Run], dict[float, int]]:
    """(width, who) -> a run, and the bytes of weights that a token of each width reads."""
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    full = LlamaForCausalLM(MODELS[args.model](args)).to(dtype).eval()
    ids = torch.randint(0, full.config.vocab_size, (1, args.prompt))
    elastic, packed = elastic_of(full), elastic_of(full)
    flextron.pack(packed, dtype=args.dtype if args.dtype in _BYTES else None)
    runs: dict[tuple[float, str], Run] = {}
    size, sizes = _BYTES.get(args.dtype, dtype.itemsize), {}
    ours = generation(elastic, ids, args.new)
    has_llama_cpp = importlib.util.find_spec("xllamacpp") is not None
    if not has_llama_cpp:
        print("bench_model: xllamacpp is not installed, so there is no llama.cpp beside the others")
    plain = {
        share: flextron.extract(elastic, widths_of(elastic, share)) for share in args.widths if share != 1
    }
    for share in args.widths:
        widths = widths_of(elastic, share)
        sizes[share] = round(elastic.elastic.params(widths) * size)
        same = plain.get(share, full)
        runs[share, "flextron, packed"] = at_width(generation(packed, ids, args.new), packed, widths)
        if args.dtype not in _BYTES:
            runs[share, "flextron"] = at_width(ours, elastic, widths)
            runs[share, "transformers"] = generation(same, ids, args.new)
        if has_llama_cpp:
            path = folder / f"{share}.gguf"
            export_gguf(elastic, path, widths, kind=_GGUF[args.dtype])
            rival = LlamaCpp(path, torch.get_num_threads(), args.prompt + args.new + 64)
            runs[share, "llama.cpp"] = of_llama_cpp(rival, ids, args.new)
    return runs, sizes


def measure(args: argparse.Namespace) -> list[Row]:
    if args.device.type != "cpu" or args.as_gpu:
        return [row for batch in args.batch for row in measure_on_gpu(args, batch)]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runs, sizes = contestants(args, Path(folder))
        if not args.no_wait:
            wait_until_idle()
        before, samples = read_bandwidth(), taking_turns(runs, args.rounds)
        return rows_of(args, samples, sizes, max(before, read_bandwidth()), 1)


def measure_on_gpu(args: argparse.Namespace, batch: int) -> list[Row]:
    """The rows of one batch; they are written at once, as a GPU may be lent for a short time."""
    torch.manual_seed(0)
    device, dtype = args.device, DTYPES[args.dtype]
    full = gpu.random_model(MODELS[args.model](args), dtype, device)
    elastic = elastic_of(full)
    widths = {share: widths_of(elastic, share) for share in args.widths}
    ids = torch.randint(0, full.config.vocab_size, (batch, args.prompt), device=device)
    sizes = {
        share: elastic.elastic.memory_bytes(
            chosen, batch=batch, context=args.prompt + args.new // 2, bytes_per_value=dtype.itemsize
        )
        for share, chosen in widths.items()
    }
    runs = {
        (share, gpu.WHO[who]): make()
        for share, who, make in gpu.contestants(full, elastic, widths, ids, args.new)
        if who in args.who
    }
    with tempfile.TemporaryDirectory() as folder:
        if "vllm" in args.who and 1.0 in widths and gpu.has_vllm():
            config = copy.deepcopy(full.config)
            runs[1.0, gpu.WHO["vllm"]] = gpu.of_vllm(Path(folder), config, dtype, ids, args.new)
        with torch.no_grad():
            samples = taking_turns(runs, args.rounds)
    bandwidth = gpu.read_bandwidth(device, 4 * 2**30 if device.type == "cuda" else 2**24)
    rows = rows_of(args, samples, sizes, bandwidth, batch)
    show(rows)
    if args.csv:
        write_csv(args.csv, rows)
    del full, elastic, runs
    gpu.forget()
    return rows


def taking_turns(runs: dict[tuple[float, str], Run], rounds: int) -> dict[tuple[float, str], list[Times]]:
    samples: dict[tuple[float, str], list[Times]] = {key: [] for key in runs}
    for done in range(rounds + 1):
        for key in list(runs)[:: -1 if done % 2 else 1]:
            times = runs[key]()
            if done:  # the first warms up
                samples[key].append(times)
    return samples


def rows_of(
    args: argparse.Namespace,
    samples: dict[tuple[float, str], list[Times]],
    sizes: dict[float, int],
    bandwidth: float,
    batch: int,
) -> list[Row]:
    def rate(values: list[float], tokens: int) -> tuple[float, float]:
        middle = median(values)
        # too few tokens for the clock, where they are a difference of two times
        return (tokens / middle, (max(values) - min(values)) / middle) if middle > 0 else (nan, nan)

    rows, machine = [], gpu.name_of(args.device)
    for (share, who), times in samples.items():
        prompt, each = zip(*times, strict=True)
        row = (
            *rate(list(prompt), batch * args.prompt),
            *rate(list(each), batch),
            batch * bandwidth / sizes[share],
            bandwidth / 1e9,
        )
        tail = (torch.get_num_threads(), args.rounds, machine, commit(), batch)
        rows.append(Row(args.model, args.dtype, share, who, *row, *tail))
    return rows


def commit() -> str:
    """The commit that figures are labelled with; a machine that a copy was brought to has no git."""
    if known := os.environ.get("FLEXTRON_COMMIT"):
        return known
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def show(rows: list[Row]) -> None:
    print(
        f"\n{rows[0].model}, {rows[0].dtype}, batch {rows[0].batch}, {rows[0].threads} threads, "
        f"reads {rows[0].read_gb_s:.1f} GB/s"
    )
    print(
        f"{'width':>5}  {'':30} {'prefill/s':>9} {'spread':>6} {'decode/s':>9} {'spread':>6} {'of ideal':>8}"
    )
    for r in sorted(rows, key=lambda r: (-r.width, r.who)):
        print(
            f"{r.width:5.2f}  {r.who:30} {r.prefill:9.1f} {r.prefill_spread:6.0%} {r.decode:9.1f} "
            f"{r.decode_spread:6.0%} {r.decode / r.ideal_decode:8.2f}"
        )
    full = {r.who: r for r in rows if r.width == 1}
    for r in sorted(rows, key=lambda r: (r.who, -r.width)):
        if r.width < 1 and r.who.startswith("flextron") and r.who in full:
            gain, ideal = r.decode / full[r.who].decode, r.ideal_decode / full[r.who].ideal_decode
            print(
                f"{r.who} at {r.width:.2f}: {gain:.2f} x its full width, {gain / ideal:.2f} of what the bytes allow"
            )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="shapes, with random weights")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, or cuda")
    parser.add_argument("--layers", type=int, help="layers of a Llama; all on a GPU, 4 on a CPU by default")
    parser.add_argument(
        "--batch",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[1],
        help="sequences, on a GPU",
    )
    parser.add_argument(
        "--who",
        type=lambda text: text.split(","),
        default=[who for who in gpu.WHO if who != "compiled"],
        help=f"contestants on a GPU: some of {','.join(gpu.WHO)}; all but compiled, which takes minutes, by default",
    )
    parser.add_argument("--as-gpu", action="store_true", help="a GPU's contestants on a CPU, as stand-ins")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=24, help="tokens that are decoded after the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--widths", type=lambda text: [float(w) for w in text.split(",")], default=list(WIDTHS)
    )
    parser.add_argument("--no-wait", action="store_true", help="time at once, whatever else runs")
    parser.add_argument("--csv", type=Path, help="where the figures go; lines are added")
    return parser.parse_args(arguments)


def write_csv(path: Path, rows: list[Row]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow([f.name for f in fields(Row)])
        for row in rows:
            writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in astuple(row)])


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    args = parse()
    rows = measure(args)
    print(f"{gpu.name_of(args.device)}, torch {torch.__version__}")
    if args.device.type == "cpu" and not args.as_gpu:
        show(rows)
        if args.csv:
            write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
