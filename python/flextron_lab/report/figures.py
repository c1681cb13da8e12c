"""The figures of the pages, drawn with matplotlib by one function each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = {
    "full": "#1d2733",
    "routed": "#1f6fb4",
    "uniform": "#d9770b",
    "searched": "#2a9d5c",
    "adaptive": "#a0409a",
}
_CYCLE = ("#1f6fb4", "#d9770b", "#2a9d5c", "#a0409a", "#7a6a53", "#c0392b")
Series = Mapping[str, Sequence[tuple[float, float, float]]]  # name -> points (x, mean, half the spread)


def _axes(columns: int = 1, height: float = 3.6, **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#8a94a0",
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": "#e6eaee",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "svg.fonttype": "path",
        "svg.hashsalt": "flextron",  # the same figure is the same file
        **options,
    }
    with plt.rc_context(style):
        return plt.subplots(1, columns, figsize=(10, height), layout="constrained")


def losses(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw held-out loss against measured latency and its spread, a line for each kind of budget of `judge_budgets`."""
    figure, ax = _axes()
    for kind in dict.fromkeys(row["kind"] for row in rows):
        columns = ("measured_ms", "loss", "target", "spread_ms")
        points = sorted(tuple(r[name] for name in columns) for r in rows if r["kind"] == kind)
        x, y, _, half = zip(*points, strict=True)
        colour, size = COLOURS.get(kind, "#7a6a53"), 9 if kind == "full" else 5
        ax.errorbar(x, y, xerr=half, fmt="o-", color=colour, label=kind, markersize=size, capsize=3)
        if kind == "routed":
            for at, loss, target, _ in points:
                ax.annotate(f"{target:g}", (at, loss), (-3, -13), textcoords="offset points", fontsize=8)
    ax.set_xlabel("measured latency, ms")
    ax.set_ylabel("held-out loss, nats a token")
    ax.legend()
    return figure


def router_map(
    budgets: Sequence[float], mlp: Sequence[Sequence[float]], heads: Sequence[Sequence[float]]
) -> Any:
    """Draw the share, in [0, 1], that each layer keeps at each budget; ``mlp`` and ``heads``: [budgets][layers]."""
    figure, both = _axes(2, 0.9 + 0.36 * len(budgets), **{"axes.grid": False})
    image = None
    for ax, title, shares in zip(both, ("MLP neurons", "attention heads"), (mlp, heads), strict=True):
        image = ax.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="Blues", origin="lower")
        layers = len(shares[0])
        if layers <= 16:
            for y, row in enumerate(shares):
                for x, share in enumerate(row):
                    ax.text(
                        x, y, f"{share:.2f}".lstrip("0"), ha="center", va="center", fontsize=8,
                        color="white" if share > 0.6 else "#1d2733",
                    )  # fmt: skip
        ax.set_xticks(range(0, layers, max(1, layers // 10)))
        ax.set_yticks(range(len(budgets)), [f"{b:g}" for b in budgets])
        ax.set_xlabel("layer")
        ax.set_title(title)
    both[0].set_ylabel("budget")
    figure.colorbar(image, ax=both, label="share kept", shrink=0.9)
    return figure


def scatter(predicted: Sequence[float], observed: Sequence[float], fractions: Sequence[float]) -> Any:
    """Draw the losses that the surrogate predicts for unseen configurations against those of the model."""
    figure, ax = _axes()
    points = ax.scatter(observed, predicted, c=fractions, cmap="viridis", s=22, vmin=0, vmax=1)
    low, high = min([*predicted, *observed]), max([*predicted, *observed])
    ax.plot([low, high], [low, high], color="#8a94a0", linewidth=1, zorder=0)
    ax.set_xlabel("observed loss above the full model's, nats")
    ax.set_ylabel("predicted")
    figure.colorbar(points, ax=ax, label="fraction of the full latency")
    return figure


def curves(panels: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str = "step") -> Any:
    """Draw a small panel for each curve; ``panels`` maps a title to (x, y)."""
    figure, axes = _axes(len(panels), 2.7)
    for ax, (title, (x, y)) in zip([axes] if len(panels) == 1 else axes, panels.items(), strict=True):
        ax.plot(x, y, color=_CYCLE[0], linewidth=1.2)
        ax.set_title(title)
        ax.set_xlabel(xlabel)
    return figure


def comparison(panels: Mapping[str, Series], xlabel: str, ylabel: str) -> Any:
    """Draw means with their spread as bars, a panel for each title."""
    figure, axes = _axes(len(panels))
    for ax, (title, series) in zip([axes] if len(panels) == 1 else axes, panels.items(), strict=True):
        for (name, points), colour in zip(series.items(), _CYCLE * 2, strict=False):
            x, mean, half = zip(*sorted(points), strict=True)
            ax.errorbar(x, mean, half, fmt="o-", color=colour, label=name, capsize=3, markersize=5)
        ax.set_title(title)
        ax.set_xlabel(xlabel)
        ax.legend(fontsize=8)
    (axes if len(panels) == 1 else axes[0]).set_ylabel(ylabel)
    return figure
