"""What a machine that others use does to profiles and deadlines: beside a process that takes cores for a while.

    python python/studies/disturbed.py elastic/ profile     whole, half and disturbed profiles of decoding, compared
    python python/studies/disturbed.py elastic/ deadline    steps in time, and loss, with a fixed budget and a held one

Both measure on their own and leave the checkpoint as it is. Quiet figures want a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from flextron import ui
from flextron.artefacts.latency_table import LatencyTable, Workload
from flextron.artefacts.planner import planner_of
from flextron.checkpoint.hf import read_tokenizer
from flextron.config import Widths
from flextron.corpus import held_out_windows
from flextron.inference import from_pretrained
from flextron.nn.deadline import Held, Hold
from flextron.nn.protocol import Elastic
from flextron.routing.profile import profile

TAKES = """
import os, sys, time
on, off = map(float, sys.argv[1:])
started_by = os.getppid()
while os.getppid() == started_by:  # not beyond a study that was killed
    end = time.perf_counter() + on
    while time.perf_counter() < end:
        pass
    time.sleep(off)
"""
Disturbance = Callable[[], AbstractContextManager[object]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="elastic checkpoint")
    parser.add_argument("what", choices=("profile", "deadline"))
    parser.add_argument("--cores", type=int, default=1, help="processes that take a core each")
    parser.add_argument("--on", type=float, default=2.0, help="seconds for which they take it")
    parser.add_argument("--off", type=float, default=2.0, help="seconds for which they leave it")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of a whole profile")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds that a profile may go on for")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=160, help="tokens that follow it, in each arm")
    parser.add_argument("--texts", type=int, default=2, help="held-out texts of each arm")
    parser.add_argument(
        "--limit", type=float, default=0.85, help="deadline of a step, of the full model's time"
    )
    parser.add_argument("--floor", type=float, help="lowest budget that the held arm may take")
    args = parser.parse_args()
    model = from_pretrained(args.directory)

    def disturbance() -> AbstractContextManager[object]:
        return taken(args.cores, args.on, args.off)

    workload = Workload.decode(args.prompt + args.tokens // 2)
    with ui.reporter() as progress:
        if args.what == "profile":
            rows = profiles(model, workload, args.rounds, args.patience, disturbance, progress)
            title = f"{workload}: profiles beside that of {args.rounds} rounds; {args.cores} cores taken"
            header = [
                "profile",
                "full ms",
                "differs by",
                "its fractions by",
                "worst residual",
                "taken",
                "drift",
                "verdict",
            ]
        else:
            table = profile(
                model,
                workload,
                rounds=3,
                patience=args.patience,
                progress=lambda done, total: progress("profiling", done, total),
            )
            tokens = held_out_windows(
                read_tokenizer(args.directory), None, args.texts, args.prompt + args.tokens
            )
            rows = deadlines(model, table, tokens, args.prompt, args.limit, args.floor, disturbance, progress)
            title = f"steps within {args.limit * table.full_ms:.1f} ms; full model {table.full_ms:.1f} ms"
            header = ["machine", "budget", "in time", "median ms", "95 % ms", "mean budget", "least", "loss"]
    ui.print_table(title, header, rows)


@contextlib.contextmanager
def taken(cores: int, on: float, off: float) -> Iterator[None]:
    """So many processes that compute for ``on`` seconds, and sleep for ``off``, again and again."""
    running = [subprocess.Popen([sys.executable, "-c", TAKES, str(on), str(off)]) for _ in range(cores)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def profiles(
    model: Elastic,
    workload: Workload,
    rounds: int,
    patience: float,
    disturbance: Disturbance,
    progress: Callable[[str, int, int], None],
) -> list[list[str]]:
    """A whole profile on the machine as it is, one of half the rounds, and a whole one that is disturbed."""
    quiet: Disturbance = contextlib.nullcontext
    arms = {
        "whole": (rounds, quiet),
        "half": (max(1, rounds // 2), quiet),
        "disturbed": (rounds, disturbance),
    }
    rows, first = [], None
    for name, (count, beside) in arms.items():

        def report(done: int, total: int, name: str = name) -> None:
            progress(f"{name} profile", done, total)

        with beside():
            table = profile(model, workload, rounds=count, patience=patience, progress=report)
        first = first or table
        noise = table.noise
        assert noise is not None
        rows.append(
            [
                name,
                f"{table.full_ms:.2f}",
                f"{abs(table.full_ms / first.full_ms - 1):.1%}",
                f"{_disagreement(first, table):.1%}",
                f"{table.residual_worst:.1%}",
                "not known" if noise.taken is None else f"{noise.taken:.0%}",
                f"{noise.drift:.1%}",
                "refused" if table.doubt else "accepted",
            ]
        )
    return rows


def _disagreement(one: LatencyTable, other: LatencyTable) -> float:
    """The largest difference between two tables' shares of the full time, over the networks that one was judged by."""
    judged = [check.widths for check in (*one.fitted, *one.held_out)]
    return max(abs(other.fraction(widths) / one.fraction(widths) - 1) for widths in judged)


class Told(LogitsProcessor):
    """Makes a generation say the tokens of a text, and keeps the loss of each.

    Args:
        text: [length] int64, the prompt and what follows it.
    """

    def __init__(self, text: Tensor) -> None:
        self.text = text
        self.losses: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.text[input_ids.shape[1]]
        self.losses.append(-float(scores[0].log_softmax(-1)[token]))
        return torch.full_like(scores, -math.inf).index_fill_(1, token[None], 0.0)


def deadlines(
    model: Elastic,
    table: LatencyTable,
    tokens: Tensor,
    prompt: int,
    limit: float,
    floor: float | None,
    disturbance: Disturbance,
    progress: Callable[[str, int, int], None],
) -> list[list[str]]:
    """Every arm says the same texts, step by step, on the machine as it is and disturbed; in turn, text by text."""
    model.planner = replace(planner_of(model), tables=(table,))
    limit_ms = limit * table.full_ms
    chosen = model.planner.resolve(latency_ms=limit_ms, phase="decode")

    def fixed(widths: Widths) -> None:  # a ladder of one rung, so that its steps are measured alike
        model.turn(Hold([(widths, table.predict(widths))], 0, latency_ms=limit_ms).dial(0))

    def held() -> None:
        model.set_budget(latency_ms=limit_ms, phase="decode", hold=True, floor=floor)

    arms: dict[str, Callable[[], None]] = {
        "full": lambda: fixed(model.elastic.full()),
        "fixed": lambda: fixed(chosen),
        "held": held,
    }
    machines: dict[str, Disturbance] = {"as it is": contextlib.nullcontext, "disturbed": disturbance}
    found: dict[tuple[str, str], list[tuple[Held, list[float]]]] = {}
    total = len(machines) * len(arms) * len(tokens)
    for machine, beside in machines.items():
        with beside():
            for text in tokens:
                for name, turn in arms.items():
                    turn()
                    found.setdefault((machine, name), []).append(_said(model, text, prompt))
                    progress("saying texts", sum(map(len, found.values())), total)
    return [[machine, name, *_cells(runs, limit_ms, table)] for (machine, name), runs in found.items()]


def _said(model: Elastic, text: Tensor, prompt: int) -> tuple[Held, list[float]]:
    told = Told(text)
    model.generate(
        text[None, :prompt],
        max_new_tokens=len(text) - prompt,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([told]),
    )
    assert model.held is not None
    return model.held, told.losses


def _cells(runs: Sequence[tuple[Held, list[float]]], limit_ms: float, table: LatencyTable) -> list[str]:
    steps = [token for held, _ in runs for token in held.tokens[1:]]
    times = sorted(token.ms for token in steps if token.ms is not None)
    budgets = [table.fraction(token.widths) for token in steps]
    losses = [loss for _, some in runs for loss in some]

    def at(share: float) -> float:
        return times[min(len(times) - 1, int(share * len(times)))]

    return [
        f"{sum(ms <= limit_ms for ms in times) / len(times):.1%}",
        f"{at(0.5):.1f}",
        f"{at(0.95):.1f}",
        f"{sum(budgets) / len(budgets):.2f}",
        f"{min(budgets):.2f}",
        f"{sum(losses) / len(losses):.3f}",
    ]


if __name__ == "__main__":
    main()
