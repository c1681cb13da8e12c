"""The page of one elastic checkpoint: figures of what its stages stored, and new measurements of its budgets."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flextron import pipeline
from flextron.artefacts.adaptive_router import AdaptiveResult
from flextron.artefacts.directory import ElasticDirectory
from flextron.artefacts.planner import planner_of
from flextron.artefacts.static_router import RouterResult
from flextron.checkpoint import commit
from flextron.checkpoint.hf import read_tokenizer
from flextron.corpus import Data, held_out_windows
from flextron.judge.budgets import judge_budgets
from flextron.nn.placement import Device, one_device
from flextron.nn.protocol import Elastic
from flextron.nn.storage import Dtype
from flextron.training.metrics import METRICS_FILE, read_metrics
from flextron_lab.report import figures
from flextron_lab.report.page import Section, render

PAGE = "report.html"
Progress = Callable[[str, int, int], Any]


def report(
    directory: str | Path,
    *,
    data: Data = None,
    budgets: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9),
    samples: int = 16,
    length: int = 256,
    rounds: int = 5,
    dtype: Dtype | None = None,
    device: Device = "auto",
    progress: Progress | None = None,
) -> Path:
    """Measure the budgets of a profiled checkpoint and write ``report.html`` into it.

    Args:
        directory: an elastic checkpoint with a latency table of prefill; other results of its stages are shown too.
        data: text whose held-out part judges the budgets; by default Python's own documentation.
        budgets: fractions of the full model's latency; those below the fastest network's are left out.
        samples: number of held-out sequences.
        length: tokens in each of these sequences.
        rounds: samples taken of each latency.
        dtype, device: what `flextron.from_pretrained` takes.
        progress: called with the name of the work, the steps done and the steps in all.
    """
    chosen = one_device("report", device)
    with ElasticDirectory.open(directory) as checkpoint:
        model = checkpoint.equipped(dtype, chosen)
        static = checkpoint.static() if model.planner.ladder.origin == "router" else None
        adaptive = checkpoint.adaptive() if model.adaptive is not None else None
    tokenizer = read_tokenizer(directory)
    table = planner_of(model).table("prefill")
    fastest = table.smallest_ms / table.full_ms
    targets = [b for b in sorted(budgets) if fastest <= b < 1]
    if not targets:
        raise ValueError(f"report: budgets must have one from {fastest:.3f} to below 1, got {list(budgets)}")
    tokens = held_out_windows(tokenizer, data, samples, length)
    options = {"progress": progress} if progress is not None else {}
    rows = judge_budgets(
        model, tokens, targets, adaptive=model.adaptive is not None, rounds=rounds, **options
    )
    sections = [_losses(rows, table), _router_map(model, rows)]
    if model.adaptive is not None:
        sections.append(_token_map(model, tokenizer, tokens, targets))
    if static is not None:
        sections += _routers(static)
    if adaptive is not None:
        sections.append(_adaptive(adaptive))
    sections += _training(Path(directory) / pipeline.TRAINING_FOLDER)
    lead = (
        f"{model.elastic.family}, {model.elastic.num_layers} layers, "
        f"{model.elastic.params(model.elastic.full()) / 1e6:.2f} M parameters at full width; "
        f"{table.workload} on {table.machine_name}"
    )
    with commit(directory) as stage:
        (stage / PAGE).write_text(render(Path(directory).resolve().name, lead, sections), encoding="utf-8")
    return Path(directory) / PAGE


def _losses(rows: Sequence[dict[str, Any]], table: Any) -> Section:
    cells = [
        [
            r["kind"],
            f"{r['target']:.2f}",
            f"{r['loss']:.3f}",
            f"{r['predicted_ms']:.1f}",
            f"{r['measured_ms']:.1f}",
            f"{r['spread_ms']:.1f}",
            f"{r['measured_fraction']:.3f}",
        ]
        for r in rows
    ]
    judged = ""
    if table.held_out:
        judged = (
            f" On networks that the latency table was not fitted on, its median error is "
            f"{100 * table.residual_median:.1f} %, its worst {100 * table.residual_worst:.1f} %."
        )
    for said in (rows[0]["disturbed"], table.doubt and f"Doubtful: {table.doubt}."):
        judged += f" {said}" if said else ""
    return Section(
        "Loss against latency",
        "One checkpoint at several budgets; every point is measured, and its bar, ± in the table, is half the distance "
        "between the quartiles." + judged,
        [figures.losses(rows)],
        ["budget", "target", "loss", "predicted ms", "measured ms", "±", "of full"],
        cells,
    )


def _router_map(model: Elastic, rows: Sequence[dict[str, Any]]) -> Section:
    kind = "routed" if any(r["kind"] == "routed" for r in rows) else "uniform"
    shown = [r for r in rows if r["kind"] == kind]
    config = model.elastic
    who = (
        "the routers keep" if kind == "routed" else "the uniform ladder keeps, since no routers were trained"
    )
    return Section(
        "Router map",
        f"The share of each layer that {who}, by budget.",
        [
            figures.router_map(
                [r["target"] for r in shown],
                [[d / config.intermediate_size for d in r["mlp_widths"]] for r in shown],
                [[n / config.num_heads for n in r["query_heads"]] for r in shown],
            )
        ],
    )


@torch.no_grad()
def _token_map(model: Elastic, tokenizer: Any, tokens: torch.Tensor, targets: Sequence[float]) -> Section:
    """A text in which every token is the darker, the wider the router made it."""
    target = targets[len(targets) // 2]
    ids = tokens[:1]
    with model.budget(target, adaptive=True), model.watched() as forwards:
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    config = model.elastic
    places = zip(forwards[0], config.choices, strict=True)  # [B, T, L] of each axis, in its menu
    share = torch.stack([own[0] / max(1, count - 1) for own, count in places]).mean((0, 2))
    low, high = share.min(), share.max()
    shade = ((share - low) / (high - low).clamp_min(1e-6)).tolist()
    spans = [
        f'<span style="background:rgba(31,111,180,{0.75 * s:.2f})" title="{value:.2f} of the steps">'
        f"{html.escape(_shown(piece))}</span>"
        for piece, s, value in zip(
            tokenizer.convert_ids_to_tokens(ids[0].tolist()), shade, share.tolist(), strict=True
        )
    ]
    return Section(
        "Width of every token",
        f"At a budget of {target:g} the router chooses for each token. The shade shows how far up the menus it went, "
        f"as a mean over layers and both axes: from {float(low):.2f} (white) to {float(high):.2f} (dark).",
        markup=f'<div class="text">{"".join(spans)}</div>',
    )


def _shown(piece: str) -> str:
    """A token as readable text: vocabularies write spaces and line breaks as other characters."""
    return piece.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n").replace("<0x0A>", "\n")


def _routers(result: RouterResult) -> list[Section]:
    fit, gate = result.surrogate, result.gate
    found = [
        Section(
            "Surrogate",
            f"On {fit.n} configurations that it was not trained on, the surrogate has R² {fit.r2:.3f}, rank "
            f"correlation {fit.rank:.3f} and a mean error of {fit.mean_error:.3f} nats. Its worst error is "
            f"{fit.worst_error:.3f} nats, at {fit.worst_fraction:.2f} of the full latency. Of "
            f"{gate.steps_below + gate.steps_above} router steps {gate.steps_below} were taken while its error was "
            f"below {gate.threshold:g} nats.",
            [figures.scatter(fit.predicted, fit.observed, fit.fractions)],
        )
    ]
    if result.history:
        steps = [entry["step"] for entry in result.history]
        names = {
            "quality": "predicted loss / uniform's",
            "latency_miss": "miss of the target",
            "surrogate_error": "surrogate's error, nats",
        }
        panels = {title: (steps, [entry[key] for entry in result.history]) for key, title in names.items()}
        found.append(Section("Training of the routers", figures=[figures.curves(panels)]))
    header = ["target", "routed", "uniform", "searched"]
    cells = [
        [f"{t.target:g}", *(f"{x:+.3f}" for x in (t.routed_observed, t.uniform_observed, t.search_observed))]
        for t in result.targets
    ]
    text = f"{result.measure.capitalize()}, in nats, on the text that the routers were trained on."
    found.append(Section("Routers, uniform widths and search", text, (), header, cells))
    return found


def _adaptive(result: AdaptiveResult) -> Section:
    steps = [entry["step"] for entry in result.history]
    panels = {
        "loss, nats a token": (steps, [entry["loss"] for entry in result.history]),
        "miss of the target": (steps, [entry["latency_miss"] for entry in result.history]),
    }
    return Section(
        "Training of the router that chooses for every token",
        "Loss and predicted latency on sequences that it was not trained on, beside those of the static budget.",
        [figures.curves(panels)],
        ["target", "mean fraction", "loss", "static fraction", "static loss"],
        [
            [
                f"{t.target:g}",
                f"{t.fraction:.3f}",
                f"{t.loss:.3f}",
                f"{t.static_fraction:.3f}",
                f"{t.static_loss:.3f}",
            ]
            for t in result.targets
        ],
    )


def _training(folder: Path) -> list[Section]:
    path = folder / METRICS_FILE
    records = [r for r in (read_metrics(path) if path.is_file() else []) if "loss" in r]
    if not records:
        return []
    steps = [r["step"] for r in records]
    panels = {
        "training loss": (steps, [r["loss"] for r in records]),
        "size of the sub-network": (steps, [r["size"] for r in records]),
    }
    tokens = records[-1]["tokens"]
    return [Section("Elastic training", f"{tokens:,} tokens.", [figures.curves(panels)])]
