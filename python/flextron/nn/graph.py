"""A decode step as one captured CUDA graph: a token is a replay, another budget a few integers written before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

from flextron.nn.decode_step import DecodeStep, Kept, Room, Targets
from flextron.nn.forward import ElasticForward
from flextron.nn.policy import PerToken
from flextron.nn.protocol import Elastic
from flextron.nn.router import AdaptiveRouter
from flextron.nn.setting import Setting
from flextron.nn.static_cache import StaticCache
from flextron_ext import DecoderStep

MOST_ENDS = 16  # tokens that end a sequence
_WARM_UP = 2  # runs before a capture: libraries allocate and choose kernels in the first one
_captures = 0


class State(NamedTuple):
    """All that a captured step reads and writes, but for the weights. The tensors stay where they are.

    Attributes:
        ids, positions, lengths, k_start: as `DecodeStep` takes them, [B]; the step goes on to the next token itself.
        advance: [B] int64: what is added to the lengths, 1, or 0 for a sequence that is not there.
        budget: flat int64: what ``kept`` views, so that one copy writes it.
        kept, room, targets: as `DecodeStep` takes them.
        unfinished: [B] bool: no token that ends its sequence has come.
        ends, fill: [16] and [1] int64: the tokens that end a sequence, or -1; what follows them.
        made: [B, tokens] int64: the arg-max after each cached token.
        going: [1] int64: whether some sequence is unfinished.
    """

    ids: Tensor
    positions: Tensor
    lengths: Tensor
    k_start: Tensor
    advance: Tensor
    budget: Tensor
    kept: Kept
    room: Room
    targets: Targets | None
    unfinished: Tensor
    ends: Tensor
    fill: Tensor
    made: Tensor
    going: Tensor


class Begin(NamedTuple):
    """Where B sequences stand: their next tokens and positions [B], cached tokens, first visible ones [B] or None.

    ``unfinished`` [B] bool, ``ends`` [n] and ``fill`` [1] as in `State`; None where nothing ends a sequence.
    """

    ids: Tensor
    positions: Tensor
    length: int
    k_start: Tensor | None
    unfinished: Tensor | None = None
    ends: Tensor | None = None
    fill: Tensor | None = None


def captures() -> int:
    """How many graphs this process has captured."""
    return _captures


def captured(run: Callable[[State], Tensor], state: State) -> Callable[[], Tensor]:
    """What runs ``run(state)`` again at each call: on a GPU the replay of a graph, whose result stays in one place."""
    device = state.ids.device
    if device.type != "cuda":
        return partial(run, state)
    global _captures
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                run(state)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # its memory is the graph's own
            result = run(state)
    _captures += 1

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class CapturedStep:
    """The decode step of a model in the room of a cache, and the tensors through which it is told what to do.

    It holds for one gathering of the model's weights and one room; `step_in` makes another where either has moved.

    Args:
        router: the adaptive router that chooses; None: widths are written.
    """

    def __init__(
        self, model: Elastic, forward: ElasticForward, cache: StaticCache, router: AdaptiveRouter | None
    ) -> None:
        self.forward, self.sequences = forward, cache.sequences
        self.step = DecodeStep(model, forward, cache.is_paged, router)
        self.state = _state(self.step, cache)
        self.setting: Setting | None = None  # what `repeated` has written
        self._replay: Callable[[], Tensor] | None = None

    @property
    def is_new(self) -> bool:
        """Whether nothing was captured yet."""
        return self._replay is None

    def turn(self, extents: DecoderStep, B: int) -> None:
        """Write what each of B sequences keeps. The host waits for nothing."""
        state, L, rest = self.state, len(extents.kv_heads), self.sequences - B
        if extents.router is not None and state.targets is not None:
            for to, part in zip(state.targets[:2], extents.router.tensors[2:], strict=True):
                to[:, :B].copy_(part.repeat_interleave(B // part.shape[1], 1))
            state.targets.active[:B] = 1
            state.targets.active[B:] = 0
            rows = [torch.zeros(L, self.sequences, dtype=torch.int64)] * 2
        else:
            axes = (torch.tensor(axis).view(L, -1) for axis in (extents.widths, extents.heads))
            rows = [padded(axis.expand(L, B), (0, rest)) for axis in axes]
        values = torch.cat([*map(Tensor.flatten, rows), torch.tensor(extents.kv_heads)])
        if state.budget.is_cuda:
            values = values.pin_memory()
        state.budget.copy_(values, non_blocking=True)

    def begin(self, at: Begin) -> None:
        """Go on from there; the first time, after a capture."""
        self._put(at)
        if self.is_new:
            self.state.advance.zero_()  # a capture runs the step, which must stay within the room
            self._replay = captured(self._run, self.state)
            self._put(at)

    def _put(self, at: Begin) -> None:
        state, B = self.state, len(at.ids)
        for tensor in (state.ids, state.positions, state.lengths, state.k_start, state.advance):
            tensor.zero_()
        state.ids[:B].copy_(at.ids)
        state.positions[:B].copy_(at.positions)
        state.lengths[:B] = at.length
        state.advance[:B] = 1
        if at.k_start is not None:
            state.k_start[:B].copy_(at.k_start)
        state.unfinished.fill_(False)
        state.unfinished[:B].copy_(torch.ones_like(at.ids) if at.unfinished is None else at.unfinished)
        state.ends.fill_(-1)
        if at.ends is not None and at.fill is not None:
            state.ends[: at.ends.numel()].copy_(at.ends.flatten())
            state.fill.copy_(at.fill.flatten()[:1])

    def __call__(self) -> Tensor:
        """Take a token of each sequence; the logits [sequences, V], which the next call writes over."""
        assert self._replay is not None
        return self._replay()

    def _run(self, state: State) -> Tensor:
        logits, best = self.step(
            *(state.ids, state.positions, state.lengths, state.k_start),
            *(state.kept, state.room, state.targets),
        )
        tokens = best.where(state.unfinished, state.fill)
        state.made.scatter_(1, state.lengths[:, None], tokens[:, None])
        state.unfinished.logical_and_((tokens[:, None] != state.ends).all(1))
        state.going.copy_(state.unfinished.any(0, keepdim=True))
        state.ids.copy_(tokens)
        state.positions.add_(1)
        state.lengths.add_(state.advance)
        return logits


def _state(step: DecodeStep, cache: StaticCache) -> State:
    config, B, table = step.config, cache.sequences, cache.table
    L = config.num_layers

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=table.device)

    budget = integers(2 * L * B + L)
    mlp, heads, kv = budget.split([L * B, L * B, L])
    targets = None
    if step.router is not None:
        C = sum(config.choices)
        state, base = (step.router.w1.new_zeros(L, B, n) for n in (step.router.hidden, C))
        targets = Targets(state, base, integers(B))
    return State(
        ids=integers(B),
        positions=integers(B),
        lengths=cache.lengths,
        k_start=integers(B),
        advance=integers(B),
        budget=budget,
        kept=Kept(mlp.view(L, B), heads.view(L, B), kv.view(L, 1)),
        room=Room([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], table),
        targets=targets,
        unfinished=integers(B).bool(),
        ends=integers(MOST_ENDS),
        fill=integers(1),
        made=integers(B, cache.tokens),
        going=integers(1),
    )


def step_in(
    cache: StaticCache, model: Elastic, forward: ElasticForward, router: AdaptiveRouter | None
) -> CapturedStep:
    """The step of a model in the room of a cache, kept there; another where the weights or the room have moved."""
    step = cache.steps.get(router)
    if step is None or step.forward is not forward or not step.step.holds():
        step = cache.steps[router] = CapturedStep(model, forward, cache, router)
    return step


def router_of(setting: Setting) -> AdaptiveRouter | None:
    """What chooses for every token, where something does."""
    return setting.policy.router if isinstance(setting.policy, PerToken) else None
