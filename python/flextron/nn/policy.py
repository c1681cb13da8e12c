"""What decides, in each forward, how much of one layer every token uses; the dial of the model sets it.

A policy is asked once per layer and forward, by the attention, with the layer's normalised input; the MLP of
the same layer is handed what it decided. A layer without a policy has one width for everyone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flextron.config import ElasticConfig, Widths, number
from flextron.nn.router import AdaptiveRouter, Choices, GumbelSampler


@dataclass(frozen=True)
class Dial:
    """What a model is set to.

    Attributes:
        widths: one for the whole batch, or one for each request of it. With ``targets``: the full model.
        kv: which key/value groups are projected and cached, ``"selected"`` or ``"all"``.
        targets: where a router chooses for every token: fractions of the full latency, one or one per request.
        phase: whose latency the targets are fractions of.
    """

    widths: tuple[Widths, ...]
    kv: str
    targets: tuple[float, ...] = ()
    phase: str = "prefill"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "targets", tuple(float(number("Dial: targets", t)) for t in self.targets))

    @classmethod
    def of(cls, chosen: Widths | Dial) -> Dial:
        """Widths as the dial that ``set_widths`` turns to; a dial as it is."""
        return chosen if isinstance(chosen, Dial) else cls((chosen,), "selected")

    @classmethod
    def adaptive(cls, config: ElasticConfig, targets: Sequence[float], phase: str = "prefill") -> Dial:
        """The dial at which the adaptive router chooses, at one target or one for each request."""
        return cls((config.full(),), "all", tuple(targets), phase)

    def bound(self) -> Widths:
        """The widest of any request in each layer."""
        mlp = map(max, zip(*(w.mlp for w in self.widths), strict=True))
        return Widths(mlp, map(max, zip(*(w.heads for w in self.widths), strict=True)))


class Kept(NamedTuple):
    """What one axis of a layer keeps of each of N tokens.

    Attributes:
        extent: [N] int64, in units of the axis; None: all of it.
        choice: [N] int64, the extent's place in the menu; None where no router chose.
        gate: [N, C] weights of the choices, through which a router learns; None in inference. With an extent
            it is one-hot in value and soft in gradient.
    """

    extent: Tensor | None = None
    choice: Tensor | None = None
    gate: Tensor | None = None


class Decision(NamedTuple):
    """`Kept` of both axes."""

    mlp: Kept
    heads: Kept


class Policy:
    """Decides for one layer."""

    def __call__(self, x: Tensor) -> Decision:
        """Decide for the tokens of x [B, T, K], the layer's normalised input."""
        raise NotImplementedError


def per_token(rows: Tensor, x: Tensor) -> Tensor:
    """Rows [R, ...] of R requests for the B * T tokens of x [B, T, K]; request r has B / R sequences in a row.

    (``generate`` repeats each request as often as it has beams or samples.)
    """
    B, T, R = x.shape[0], x.shape[1], rows.shape[0]
    if B % R:
        raise ValueError(f"flextron: batch must be a multiple of the {R} budgets that are set, got {B}")
    return rows.repeat_interleave(B // R * T, dim=0)


class PerRequest(Policy):
    """Each sequence of a batch has its own widths.

    Args:
        widths: of each request.
        layer: index of the layer.
        device: of the model.
    """

    def __init__(self, widths: tuple[Widths, ...], layer: int, device: torch.device) -> None:
        self.mlp = torch.tensor([w.mlp[layer] for w in widths], device=device)
        self.heads = torch.tensor([w.heads[layer] for w in widths], device=device)

    def __call__(self, x: Tensor) -> Decision:
        return Decision(Kept(per_token(self.mlp, x)), Kept(per_token(self.heads, x)))


def menus_of(config: ElasticConfig, device: torch.device) -> Choices:
    """Widths of the choices of each axis, int64."""
    return Choices(
        torch.tensor(config.mlp_choices, device=device), torch.tensor(config.head_choices, device=device)
    )


class PerToken(Policy):
    """The adaptive router's choice for every token: arg-max without noise.

    (The op ``route`` sorts the tokens too, which the ops that take extents do anyway: of its 43 us for 1024 tokens
    on an AVX2 CPU, arg-max takes 10.)

    Args:
        router: adaptive router.
        layer: index of the layer.
        contexts: `AdaptiveRouter.context` of the targets [R], one of each request, for all layers.
        config: the menus.
    """

    def __init__(
        self,
        router: AdaptiveRouter,
        layer: int,
        contexts: tuple[Tensor, Tensor],
        config: ElasticConfig,
    ) -> None:
        self.router, self.layer, self.contexts = router, layer, contexts
        state, base = contexts
        self.context = state[layer], base[layer]
        self.menus = menus_of(config, base.device)

    def __call__(self, x: Tensor) -> Decision:
        logits = self.router.logits(x, self.layer, self.context)
        kept = []
        for rows, menu in zip(logits, self.menus, strict=True):
            choice = rows.argmax(-1)
            kept.append(Kept(menu.index_select(0, choice), choice))
        return Decision(*kept)


class Mixed(Policy):
    """Soft gates that somebody else drew: p of each sequence, [B, C] of each axis, shared by its tokens."""

    def __init__(self, p: Choices) -> None:
        self.p = p

    def __call__(self, x: Tensor) -> Decision:
        return Decision(*(Kept(gate=per_token(axis, x)) for axis in self.p))


class Gated(Policy):
    """A choice that a router learns by: noisy, with a gradient to the router's logits.

    The relaxed choice is ``p = softmax((scale * logits + Gumbel noise) / temperature)`` (Jang et al., arXiv
    1611.01144). Soft: the layer mixes its widths by p, at the cost of the widest. Hard: each token takes
    ``argmax p`` and pays for no more; the gradient is that of p, as far as what was computed tells
    (straight-through, Bengio et al., arXiv 1308.3432).

    Args:
        logits: of the tokens of x, each [N, C], with a gradient; or of its sequences, [B, C], whose tokens then share
            what is drawn.
        menus: widths of the choices, int64.
        noise: None: no noise.
        temperature, scale: of the relaxation.
        hard: straight-through, at the cost of the choice.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Choices],
        menus: Choices,
        noise: GumbelSampler | None,
        temperature: float,
        scale: float,
        hard: bool,
    ) -> None:
        self.logits, self.menus, self.noise = logits, menus, noise
        self.temperature, self.scale, self.hard = temperature, scale, hard
        self.soft: Choices | None = None  # probabilities without noise of the last forward, [N, C] each

    def __call__(self, x: Tensor) -> Decision:
        drawn = self._drawn(self.logits(x))
        return Decision(*(self._kept(p, menu, x) for p, menu in zip(drawn, self.menus, strict=True)))

    def _drawn(self, logits: Choices) -> Choices:
        self.soft = Choices(*(torch.softmax(self.scale * axis, -1) for axis in logits))
        if self.noise is None:
            return Choices(*(torch.softmax(self.scale * axis / self.temperature, -1) for axis in logits))
        return self.noise(logits, self.temperature, self.scale)

    def _kept(self, p: Tensor, menu: Tensor, x: Tensor) -> Kept:
        if len(p) != x.shape[:2].numel():
            p = per_token(p, x)
        if not self.hard:
            return Kept(gate=p)
        choice = p.detach().argmax(-1)
        # p - p is an exact zero: the values are one-hot to the bit
        gate = torch.nn.functional.one_hot(choice, p.shape[-1]).to(p.dtype) + (p - p.detach())
        return Kept(menu[choice], choice, gate)


class Sampled(Gated):
    """A noisy choice of each token that the layer pays for and learns nothing by: only ``soft`` has a gradient.

    It has one also inside ``torch.no_grad()``, to the router alone: what the model says of the choices is observed.
    """

    chosen: Choices  # places in the menus of the last forward, [N] each

    def __call__(self, x: Tensor) -> Decision:
        with torch.enable_grad():
            drawn = self._drawn(self.logits(x.detach()))
        self.chosen = Choices(*(p.detach().argmax(-1) for p in drawn))
        return Decision(*(Kept(menu[c], c) for menu, c in zip(self.menus, self.chosen, strict=True)))


class Given(Policy):
    """Choices that somebody else made for every token: places in the menus, [N] of each axis."""

    def __init__(self, choices: Choices, menus: Choices) -> None:
        self.kept = Decision(*(Kept(menu[c], c) for menu, c in zip(menus, choices, strict=True)))

    def __call__(self, x: Tensor) -> Decision:
        return self.kept
