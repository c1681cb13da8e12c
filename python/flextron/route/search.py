"""Plain search over table and surrogate: what the routers are checked against. It knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from flextron.config import ElasticConfig, Widths
from flextron.nn.router import Choices
from flextron.route.latency import LatencyTable
from flextron.route.surrogate import Surrogate

Score = Callable[[Sequence[Widths]], Tensor]


def one_hot(config: ElasticConfig, widths: Sequence[Widths]) -> Choices:
    """Configurations as certain choices: one-hot [n, L, C] for each axis."""
    mlp = torch.tensor([[config.mlp_choices.index(d) for d in w.mlp] for w in widths])
    heads = torch.tensor([[config.head_choices.index(n) for n in w.heads] for w in widths])
    return Choices(
        functional.one_hot(mlp, len(config.mlp_choices)).float(),
        functional.one_hot(heads, len(config.head_choices)).float(),
    )


@torch.no_grad()
def predicted_losses(
    config: ElasticConfig, table: LatencyTable, surrogate: Surrogate, widths: Sequence[Widths]
) -> Tensor:
    """Nats above the full model's loss that the surrogate predicts, [n]."""
    choices = one_hot(config, widths)
    return surrogate.loss(choices, table.expected(*choices) / table.full_ms)


def search(
    config: ElasticConfig,
    table: LatencyTable,
    surrogate: Surrogate,
    target: float,
    start: Sequence[Widths] = (),
    swaps: int = 200,
) -> Widths:
    """A configuration of low predicted loss within ``target`` of the full latency.

    Greedy: from the full model, give up the step that costs the least predicted loss for each millisecond,
    until the target is met. Then swaps, one step down and others up, as long as they help. ``start`` offers
    other points to swap from; the best of all results is returned.

    Raises:
        ValueError: the smallest network takes longer than the target.
    """
    limit = target * table.full_ms * (1 + 1e-9)
    if table.smallest_ms > limit:
        raise ValueError(
            f"search: target must be at least {table.smallest_ms / table.full_ms:.3f}, got {target}"
        )

    def score(candidates: Sequence[Widths]) -> Tensor:
        return predicted_losses(config, table, surrogate, candidates)

    found = config.full()
    while table.predict(found) > limit:
        down = _steps(config, found, -1)
        saved = torch.tensor([table.predict(found) - table.predict(w) for w in down]).clamp_min(1e-9)
        found = down[int(((score(down) - score([found])) / saved).argmin())]
    results = [
        _swap(config, table, score, w, limit, swaps) for w in [found, *start] if table.predict(w) <= limit
    ]
    return results[int(score(results).argmin())]


def _swap(
    config: ElasticConfig, table: LatencyTable, score: Score, widths: Widths, limit: float, swaps: int
) -> Widths:
    """Improve by filling up to the limit, then by single swaps of a step down for a step up."""
    best = float(score([widths])[0])
    for _ in range(swaps):
        near = [widths, *_steps(config, widths, -1)]
        reach = [w for base in near for w in _steps(config, base, +1) if table.predict(w) <= limit]
        if not reach:
            return widths
        losses = score(reach)
        place = int(losses.argmin())
        if float(losses[place]) >= best - 1e-6:
            return widths
        widths, best = reach[place], float(losses[place])
    return widths


def _steps(config: ElasticConfig, widths: Widths, direction: int) -> list[Widths]:
    """All configurations one choice up (+1) or down (-1) in one layer's axis."""
    found = []
    for axis, menu in (("mlp", config.mlp_choices), ("heads", config.head_choices)):
        chosen = getattr(widths, axis)
        for layer, width in enumerate(chosen):
            index = menu.index(width) + direction
            if 0 <= index < len(menu):
                changed = (*chosen[:layer], menu[index], *chosen[layer + 1 :])
                found.append(Widths(changed, widths.heads) if axis == "mlp" else Widths(widths.mlp, changed))
    return found
