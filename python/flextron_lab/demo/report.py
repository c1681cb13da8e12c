"""The picture of a demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLOURS = {"full": "#222222", "routed": "#1f6fb4", "uniform": "#d95f02"}


def draw(report: dict[str, Any], path: str | Path) -> None:
    """Loss against measured latency of every budget, and what the routers keep in each layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1.25, 1), layout="constrained")
    budgets = report["budgets"]
    for kind in ("uniform", "routed", "full"):
        points = sorted((b["measured_ms"], b["loss"], b["target"]) for b in budgets if b["kind"] == kind)
        x, y, _ = zip(*points, strict=True)
        left.plot(x, y, "o-", color=_COLOURS[kind], label=kind, markersize=10 if kind == "full" else 6)
        if kind == "routed":
            for ms, loss, target in points:
                left.annotate(
                    f"{target:g}", (ms, loss), xytext=(-4, -13), textcoords="offset points", fontsize=8
                )
    workload = report["workload"]
    left.set_xlabel(f"measured latency, ms  ({workload})")
    left.set_ylabel("held-out loss, nats per token")
    fig.suptitle(report["parent"], x=0.01, ha="left")
    left.set_title("one checkpoint, any latency", loc="left")
    left.grid(alpha=0.3)
    left.legend()

    routed = sorted((b for b in budgets if b["kind"] == "routed"), key=lambda b: b["target"])
    shares = [
        [
            w / m
            for axis, m in (("mlp_widths", report["full_mlp"]), ("query_heads", report["full_heads"]))
            for w in b[axis]
        ]
        for b in routed
    ]
    image = right.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="Blues", origin="lower")
    layers = len(routed[0]["mlp_widths"])
    right.axvline(layers - 0.5, color="black", linewidth=1)
    right.set_xticks([layers / 2 - 0.5, layers * 1.5 - 0.5], ["MLP, layer by layer", "heads, layer by layer"])
    right.set_yticks(range(len(routed)), [f"{b['target']:g}" for b in routed])
    right.set_ylabel("latency target")
    right.set_title("share that the routers keep", loc="left")
    fig.colorbar(image, ax=right, shrink=0.8)
    fig.savefig(path, dpi=130)
    plt.close(fig)
