"""The pictures of a demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLOURS = {"full": "#222222", "routed": "#1f6fb4", "uniform": "#d95f02"}


def draw(report: dict[str, Any], path: str | Path) -> None:
    """Draw the loss of every budget against its measured latency, and the share of each layer that routers keep."""
    plt = _pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1.25, 1), layout="constrained")
    fig.suptitle(report["parent"], x=0.01, ha="left")
    _draw_losses(left, report)
    _draw_shares(right, report)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_losses(report: dict[str, Any], path: str | Path) -> None:
    """Draw loss against latency alone: the picture in README.md."""
    plt = _pyplot()
    fig, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    _draw_losses(axes, report)
    axes.set_title(report["parent"], loc="left")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _draw_losses(axes: Any, report: dict[str, Any]) -> None:
    budgets = report["budgets"]
    for kind in ("uniform", "routed", "full"):
        columns = ("measured_ms", "loss", "target", "spread_ms")
        points = sorted(tuple(b[name] for name in columns) for b in budgets if b["kind"] == kind)
        x, y, _, half = zip(*points, strict=True)
        size = 10 if kind == "full" else 6
        axes.errorbar(x, y, xerr=half, fmt="o-", color=_COLOURS[kind], label=kind, markersize=size, capsize=3)
        if kind == "routed":
            for ms, loss, target, _ in points:
                axes.annotate(
                    f"{target:g}", (ms, loss), xytext=(-4, -13), textcoords="offset points", fontsize=8
                )
    said = (budgets[0]["disturbed"] or "").replace(": ", ":\n", 1)  # why these times mean nothing
    axes.set_xlabel(f"measured latency, ms  ({report['workload']})\n{said}".rstrip())
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_title("one checkpoint, any latency", loc="left")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_shares(axes: Any, report: dict[str, Any]) -> None:
    routed = sorted((b for b in report["budgets"] if b["kind"] == "routed"), key=lambda b: b["target"])
    shares = [
        [
            w / m
            for axis, m in (("mlp_widths", report["full_mlp"]), ("query_heads", report["full_heads"]))
            for w in b[axis]
        ]
        for b in routed
    ]
    image = axes.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="Blues", origin="lower")
    layers = len(routed[0]["mlp_widths"])
    axes.axvline(layers - 0.5, color="black", linewidth=1)
    axes.set_xticks([layers / 2 - 0.5, layers * 1.5 - 0.5], ["MLP, layer by layer", "heads, layer by layer"])
    axes.set_yticks(range(len(routed)), [f"{b['target']:g}" for b in routed])
    axes.set_ylabel("latency target")
    axes.set_title("share that the routers keep", loc="left")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
