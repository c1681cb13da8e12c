"""Loss and latency, predicted and measured, of a model at a list of budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flextron import ranks
from flextron.artefacts.ladder import uniform_ladder
from flextron.artefacts.latency_table import Workload
from flextron.artefacts.planner import planner_of
from flextron.config import Widths
from flextron.judge.latency import fractions, measure
from flextron.judge.loss import evaluate
from flextron.nn import Dial
from flextron.nn.protocol import Elastic

Progress = Callable[[str, int, int], Any]
_SAMPLES = "eval: samples"


def judge_budgets(
    model: Elastic,
    tokens: Tensor,
    targets: Sequence[float],
    *,
    phase: str = "prefill",
    batch: int | None = None,
    context: int | None = None,
    adaptive: bool = False,
    rounds: int = 5,
    batch_size: int = 4,
    progress: Progress = lambda *_: None,
) -> list[dict[str, Any]]:
    """Loss, predicted and measured latency of the full model and of each target.

    Of several processes each takes its part of ``tokens``, and rank 0 alone measures time while the others wait.

    A target is met once by the routers, if there are any (``"routed"``), and once by a ladder that treats all
    layers alike (``"uniform"``); with ``adaptive`` also by the router that chooses for every token: what is
    predicted then is the mean over ``tokens``, and what is measured has the routers' own time in it.

    A row's ``spread_ms`` is half the distance between the quartiles of its samples, and ``disturbed`` the sentence
    that says why its times mean nothing, the same in all rows, or None.

    Args:
        model: from `from_pretrained`, profiled.
        tokens: [n, length] int64, held out.
        targets: fractions of the full model's latency.
        phase, batch, context: which of the workloads that were profiled on this machine; see `Planner.table`.
        rounds: samples of each measurement; full model and candidates are interleaved.
    """
    planner = planner_of(model)
    workload: dict[str, Any] = {"phase": phase, "batch": batch, "context": context}
    table = planner.table(**workload)
    ranks.rows_of(_SAMPLES, tokens)  # before the work
    planners = {"uniform": replace(planner, ladder=uniform_ladder(model.elastic))}
    if planner.ladder.origin != "uniform":
        planners = {"routed": planner} | planners
    static = [("full", 1.0, model.elastic.full())]
    static += [(kind, t, p.resolve(t, **workload)) for kind, p in planners.items() for t in targets]
    predicted = [table.predict(widths) for _, _, widths in static]
    chosen: list[tuple[str, float, Widths | Dial]] = [*static]
    if adaptive:
        chosen += [("adaptive", t, Dial.adaptive(model.elastic, [t], phase)) for t in targets]
        group = table.workload.batch if phase == "decode" else 1
        found = ranks.over_rows(tokens, lambda mine: fractions(model, table, mine, targets, phase), group)
        predicted += (found * table.full_ms).tolist()

    def timed() -> dict[str, Any]:
        found = measure(
            model,
            [dial for _, _, dial in chosen[1:]] or [chosen[0][2]],
            table.workload,
            rounds=rounds,
            ids=_workload_tokens(tokens, table.workload),
            on_round=lambda done: progress("measuring budgets", done, rounds),
        )
        return {
            "times": [list(one) for one in (found.full, *found.others)],
            "disturbed": found.noise.sentence,
        }

    measured = ranks.first(timed)
    full_ms = measured["times"][0][0]
    rows = []
    for (kind, target, dial), (ms, spread), expected in zip(
        chosen, measured["times"], predicted, strict=False
    ):
        widths = dial.bound() if isinstance(dial, Dial) else dial
        rows.append(
            {
                "kind": kind,
                "target": target,
                "loss": float(ranks.over_rows(tokens, partial(_loss, model, dial, batch_size))),
                "predicted_ms": expected,
                "measured_ms": ms,
                "spread_ms": spread,
                "measured_fraction": ms / full_ms,
                "disturbed": measured["disturbed"],
                "params": model.elastic.params(widths),
                "mlp_widths": list(widths.mlp),
                "kv_groups": [model.elastic.kv_heads(n) for n in widths.heads],
                "query_heads": [model.elastic.query_heads(n) for n in widths.heads],
            }
        )
        progress("held-out loss of budgets", len(rows), len(chosen))
    return rows


def _loss(model: Elastic, dial: Widths | Dial, batch_size: int, tokens: Tensor) -> Tensor:
    return torch.tensor(evaluate(model, tokens, [dial], batch_size)[0], dtype=torch.float64)


def _workload_tokens(tokens: Tensor, workload: Workload) -> Tensor:
    """Real text in the shape of a workload: a router's choices, and so its time, depend on the tokens."""
    stream, wanted = tokens.flatten(), workload.tokens
    stream = stream.repeat(-(-wanted // len(stream)))[:wanted]
    return stream.view(workload.batch, workload.length)
