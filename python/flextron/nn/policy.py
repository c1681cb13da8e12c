"""What decides, in each forward, how much of a layer every token uses; the model's dial sets it.

A policy is asked once per layer and forward, with the layer's normalised input; the layer hands the decision to its
attention and its MLP. Without a policy every token uses the layer's width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flextron.config import AXES, ElasticConfig, PerAxis, Widths, number
from flextron.nn.router import AdaptiveRouter, GumbelSampler, Indices, Logits, Menus, Probabilities
from flextron_ext import DecoderRouter, DecoderStep

if TYPE_CHECKING:
    from flextron.nn.deadline import Hold


@dataclass(frozen=True)
class Dial:
    """What a model is set to.

    Attributes:
        widths: one for the whole batch, or one for each request of it. With ``targets``: the full model.
        kv: which key/value groups are projected and cached, ``"selected"`` or ``"all"``.
        targets: where a router chooses for every token: fractions of the full latency, one or one per request.
        phase: whose latency the targets are fractions of.
        hold: the deadline that a generation keeps, by widths that change between its steps; None: there is none.
    """

    widths: tuple[Widths, ...]
    kv: str
    targets: tuple[float, ...] = ()
    phase: str = "prefill"
    hold: Hold | None = None

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
        return Widths.largest(self.widths)


class AxisDecision(NamedTuple):
    """What one axis of a layer keeps of each of N tokens.

    Attributes:
        extent: [N] int64, in units of the axis; None: the layer's width.
        choice: [N] int64, the extent's index in the menu; None where no router chose.
        mixture: [N, C] the share of each entry of the menu, through which a router learns; None in inference. With an
            extent it is one-hot in value and soft in gradient.
    """

    extent: Tensor | None = None
    choice: Tensor | None = None
    mixture: Tensor | None = None

    def without(self, y: Tensor, bias: Tensor | None, menu: Sequence[int]) -> Tensor:
        """What a part gives, y [..., K], without the bias that it has added to the tokens that skip it."""
        if bias is None or menu[0] > 0:
            return y
        if self.mixture is not None:
            skipped = self.mixture[:, 0]
        elif self.extent is not None:
            skipped = self.extent == 0
        else:
            return y
        return y - skipped.to(y.dtype).view(*y.shape[:-1], 1) * bias


class Decision(PerAxis[AxisDecision]):
    """`AxisDecision` of each axis."""


BY_WIDTH = Decision(*(AxisDecision() for _ in AXES))  # every token keeps the layer's width


class Policy:
    """Decides for all layers of a model."""

    def __call__(self, x: Tensor, layer: int) -> Decision:
        """Decide for the tokens of x [B, T, K], the normalised input of a layer."""
        raise NotImplementedError

    def again(self) -> Policy:
        """What to ask when a layer runs again in the backward pass: its next decision is the one due here now."""
        return self

    def extents(self, B: int, kv_heads: Sequence[int]) -> DecoderStep | None:
        """The same for the decoder op and B sequences; None where the op cannot decide so."""
        return None


def per_token(rows: Tensor, x: Tensor) -> Tensor:
    """Rows [R, ...] of R requests for the B * T tokens of x [B, T, K]; request r has B / R sequences in a row.

    (``generate`` repeats each request as often as it has beams or samples.)
    """
    B, T, R = x.shape[0], x.shape[1], rows.shape[0]
    if B % R:
        raise ValueError(f"flextron: batch must be a multiple of the {R} budgets that are set, got {B}")
    return rows.repeat_interleave(B // R * T, dim=0)


class PerRequest(Policy):
    """Each request of a batch has its own widths.

    Args:
        widths: one for each of R requests.
        device: the model's.
    """

    def __init__(self, widths: Sequence[Widths], device: torch.device) -> None:
        self.widths = tuple(widths)
        by_axis = zip(*(w.axes for w in widths), strict=True)
        self.rows = [torch.tensor(own, device=device).T.unbind() for own in by_axis]  # [R] for each layer

    def __call__(self, x: Tensor, layer: int) -> Decision:
        return Decision(*(AxisDecision(per_token(layers[layer], x)) for layers in self.rows))

    def extents(self, B: int, kv_heads: Sequence[int]) -> DecoderStep | None:
        repeats, rest = divmod(B, len(self.widths))
        if rest:
            return None

        def rows(axis: str) -> list[int]:
            layers = zip(*(getattr(w, axis) for w in self.widths), strict=True)
            return [n for layer in layers for n in layer for _ in range(repeats)]

        return DecoderStep(rows("mlp"), rows("heads"), kv_heads)


def menus_of(config: ElasticConfig, device: torch.device) -> Menus:
    """The menu of each axis, int64."""
    return Menus(*(torch.tensor(menu, device=device) for menu in config.menus))


class PerToken(Policy):
    """The adaptive router's choice for every token: arg-max without noise.

    (The op ``route`` sorts the tokens too, which the ops that take extents do anyway: of its 43 us for 1024 tokens
    on an AVX2 CPU, arg-max takes 10.)

    Args:
        router: the adaptive router.
        context: its `AdaptiveRouter.context` for all layers and the targets [R], one for each request.
        config: holds the menus.
    """

    def __init__(self, router: AdaptiveRouter, context: tuple[Tensor, Tensor], config: ElasticConfig) -> None:
        self.router, self.context, self.config = router, context, config
        self.layers = list(zip(*(part.unbind() for part in context), strict=True))
        self.menus = menus_of(config, context[1].device)

    def __call__(self, x: Tensor, layer: int) -> Decision:
        logits = self.router.logits(x, layer, self.layers[layer])
        decisions = []
        for rows, menu in zip(logits, self.menus, strict=True):
            choice = rows.argmax(-1)
            decisions.append(AxisDecision(menu.index_select(0, choice), choice))
        return Decision(*decisions)

    def extents(self, B: int, kv_heads: Sequence[int]) -> DecoderStep | None:
        requests = self.context[1].shape[1]
        if B % requests:
            return None
        tensors, config = (self.router.w1, self.router.w2, *self.context), self.config
        return DecoderStep((), (), kv_heads, DecoderRouter(tensors, *config.menus))


class Mixed(Policy):
    """Probabilities that a caller drew: p of each sequence, [B, L, C] of each axis, shared by its tokens."""

    def __init__(self, p: Probabilities) -> None:
        self.p = p

    def __call__(self, x: Tensor, layer: int) -> Decision:
        return Decision(*(AxisDecision(mixture=per_token(axis[:, layer], x)) for axis in self.p))


class Relaxed(Policy):
    """A choice that a router learns by: noisy, with a gradient to the router's logits.

    The relaxed choice is ``p = softmax((scale * logits + Gumbel noise) / temperature)`` (Jang et al., arXiv
    1611.01144). Soft: the layer mixes its widths by p, at the cost of the widest. Hard: each token takes
    ``argmax p`` and pays for no more; the gradient is that of p, as far as what was computed tells
    (straight-through, Bengio et al., arXiv 1308.3432).

    Args:
        logits: called with x and a layer, returns logits [N, C] of the tokens of x, with a gradient; or [B, C] of its
            sequences, whose tokens then share what is drawn.
        menus: the menu of each axis, int64.
        noise: None: no noise.
        temperature, scale: those of the relaxation.
        hard: straight-through, at the cost of the choice.

    Attributes:
        soft: each layer's probabilities without noise in the last forward, [N, C].
    """

    def __init__(
        self,
        logits: Callable[[Tensor, int], Logits],
        menus: Menus,
        noise: GumbelSampler | None,
        temperature: float,
        scale: float,
        hard: bool,
    ) -> None:
        self.logits, self.menus, self.noise = logits, menus, noise
        self.temperature, self.scale, self.hard = temperature, scale, hard
        self.soft: dict[int, Probabilities] = {}

    def __call__(self, x: Tensor, layer: int) -> Decision:
        drawn = self._drawn(x, layer)
        return Decision(*(self._decision(p, menu, x) for p, menu in zip(drawn, self.menus, strict=True)))

    def again(self) -> Relaxed:
        other = copy.copy(self)
        other.soft = {}  # those of the forward stay, and nothing holds what was computed again
        other.noise = copy.deepcopy(self.noise)
        return other

    def _drawn(self, x: Tensor, layer: int) -> Probabilities:
        logits = self.logits(x, layer)
        self.soft[layer] = Probabilities(*(torch.softmax(self.scale * axis, -1) for axis in logits))
        if self.noise is None:
            return Probabilities(
                *(torch.softmax(self.scale * axis / self.temperature, -1) for axis in logits)
            )
        return self.noise(logits, self.temperature, self.scale)

    def _decision(self, p: Tensor, menu: Tensor, x: Tensor) -> AxisDecision:
        if len(p) != x.shape[:2].numel():
            p = per_token(p, x)
        if not self.hard:
            return AxisDecision(mixture=p)
        choice = p.detach().argmax(-1)
        # p - p is an exact zero: the values are one-hot to the bit
        mixture = torch.nn.functional.one_hot(choice, p.shape[-1]).to(p.dtype) + (p - p.detach())
        return AxisDecision(menu[choice], choice, mixture)


class Sampled(Relaxed):
    """A noisy choice of each token that the layer pays for and learns nothing by: only ``soft`` has a gradient.

    The gradient goes to the router alone, also inside ``torch.no_grad()``: the model's output at the choices is
    observed, not differentiated.

    Attributes:
        chosen: each layer's indices in the menus in the last forward, [N].
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.chosen: dict[int, Indices] = {}

    def __call__(self, x: Tensor, layer: int) -> Decision:
        with torch.enable_grad():
            drawn = self._drawn(x.detach(), layer)
        indices = self.chosen[layer] = Indices(*(p.detach().argmax(-1) for p in drawn))
        return Decision(*(AxisDecision(menu[c], c) for menu, c in zip(self.menus, indices, strict=True)))


class Given(Policy):
    """Choices that a caller made for every token: indices in the menus, [N, L] of each axis."""

    def __init__(self, choices: Indices, menus: Menus) -> None:
        self.choices, self.menus = choices, menus

    def __call__(self, x: Tensor, layer: int) -> Decision:
        indices = (axis[:, layer] for axis in self.choices)
        return Decision(*(AxisDecision(menu[c], c) for menu, c in zip(self.menus, indices, strict=True)))
