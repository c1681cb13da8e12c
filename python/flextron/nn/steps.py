"""The logits of one token after another, for the loop of `flextron.nn.generation`, and what may change between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from flextron.nn.cache import ElasticCache
from flextron.nn.deadline import Holding
from flextron.nn.decode_step import can_step
from flextron.nn.forward import ElasticForward
from flextron.nn.graph import Begin, CapturedStep, router_of, step_in
from flextron.nn.masks import first_keys, is_left_padded
from flextron.nn.protocol import Elastic
from flextron.nn.rotary import rotary_of
from flextron.nn.setting import Setting
from flextron.nn.static_cache import StaticCache
from flextron_ext import DecoderStep

_AHEAD = 64  # positions whose rotary tables are made at once
_LATE = 2  # tokens that a GPU may have been given beyond the one whose end the host looks at


class Steps:
    """The logits of one token after another, and their arg-max.

    A new budget or a hook on the model takes effect at the next token; a hook on a submodule only when the budget is
    set again. ``holding``, where there is one, sees every step begin and end.
    """

    def __init__(
        self, model: Elastic, prompt: Tensor, inputs: dict[str, Any], holding: Holding | None = None
    ) -> None:
        self.model, self.step, self.holding = model, ElasticForward.of(model), holding
        self.cache: ElasticCache = inputs["cache"]
        self.setting: Setting | None = None
        self.extents: DecoderStep | None = None
        self.mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        self.order: Tensor | None = None
        if self.mask is not None and not (self.cache.is_left_padded or is_left_padded(self.mask)):
            self._hide_first(self.mask)
        self.k_start = None if self.mask is None else first_keys(self.mask)
        last = torch.full((1, 1), prompt.shape[1] - 1, device=prompt.device)
        self.last = last if positions is None else positions[:, -1:]
        self.passed = 0  # tokens since that position
        # RoPE tables that depend on the longest position asked for must not be made ahead
        self.rotary = rotary_of(model, model.anatomy)
        dynamic = getattr(self.rotary, "rope_type", None) in ("dynamic", "longrope")
        self.ahead_of = torch.arange(1 if dynamic else _AHEAD)
        self.tables: list[tuple[Tensor, Tensor]] = []  # for the positions to come, the next one last

    def _hide_first(self, mask: Tensor) -> None:
        """Move the prompt's hidden keys before the visible ones, as if the prompt were padded on the left.

        The order of visible keys does not matter: RoPE has put their positions into them.
        """
        self.order = mask.bool().sort(dim=1, stable=True).indices
        self.mask = mask.gather(1, self.order)
        self.cache.arrange(self.order)

    def end(self) -> None:
        """Give the prompt's keys their places in the cache back."""
        if self.order is not None:
            self.cache.arrange(self.order.argsort(dim=1))

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, 1, V] after the tokens [B, 1], and their arg-max [B]; None where the modules ran."""
        if self.holding is not None:
            self.holding.start()
        is_served = self._is_served(len(tokens))
        self.passed += 1
        found = self._by_step(tokens) if is_served else (self._by_forward(tokens), None)
        if self.holding is not None:
            self.holding.stop()
        return found

    def ahead(
        self,
        tokens: Tensor,
        most: int,
        unfinished: Tensor,
        ending: list[Tensor],
        config: GenerationConfig,
    ) -> tuple[Tensor, Tensor, bool]:
        """Up to ``most`` tokens after the given ones, taken without a look at each: none, where one is needed.

        Returns:
            The tokens [B, n]; which sequences are unfinished, [B, 1]; whether none is.
        """
        return tokens[:, :0], unfinished, False

    def _is_served(self, B: int) -> bool:
        """Whether the modules need not run; looks at what may have been set since the last token."""
        model = self.model
        setting = model.settings.now()
        if setting is not self.setting:  # a criterion or streamer may set a budget between tokens
            self.setting = setting
            self.extents = self._extents(setting, B)
            self.cache.check(self.extents.kv_heads if self.extents else ())
        hooked = (
            model._forward_hooks or len(model._forward_pre_hooks) > 1
        )  # one of the latter is ours: `_guard_cache`
        return self.extents is not None and not hooked

    def _extents(self, setting: Setting, B: int) -> DecoderStep | None:
        return self.step.extents(self.model, B)

    def _by_step(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.extents is not None
        if not self.tables:
            tables = self.step.tables(self.step.norm, self.last + self.passed + self.ahead_of)
            self.tables = list(zip(*(table.split(1, dim=1) for table in tables), strict=True))[::-1]
        tables = self.tables.pop()
        return self.step(self.model, tokens, *tables, self.cache, self.k_start, 1, self.extents)

    def _by_forward(self, tokens: Tensor) -> Tensor:
        self.tables = []
        return self._by_modules(tokens, self.last + self.passed, self.cache)

    def _by_modules(self, tokens: Tensor, positions: Tensor, cache: ElasticCache) -> Tensor:
        """Logits [B, T, V] of tokens [B, T] at positions [B or 1, T]."""
        mask = self.mask
        if mask is not None:
            new = cache.get_seq_length() + tokens.shape[1] - mask.shape[1]
            mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
        return self.model(tokens, attention_mask=mask, position_ids=positions, cache=cache).logits


class CapturedSteps(Steps):
    """The same in a `StaticCache`: on a GPU a token is the replay of a graph, and a new budget a copy before it."""

    cache: StaticCache
    captured: CapturedStep | None = None  # None: it must begin anew

    def _extents(self, setting: Setting, B: int) -> DecoderStep | None:
        self.captured = None
        device = self.step.norm.device.type
        if torch.is_autocast_enabled(device) or not can_step(self.model, self.step) or self.step.is_watched():
            return None
        return setting.extents(B)

    def _by_step(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        B = len(tokens)
        captured = self._begun(tokens)
        captured.state.ids[:B].copy_(tokens[:, 0])
        logits = captured()[:B, None].clone()
        self._count(1)
        return logits, captured.state.ids[:B].clone()

    def _begun(self, tokens: Tensor, *ending: Any) -> CapturedStep:
        """The step, ready for these tokens at the positions that come next."""
        cache, setting = self.cache, self.setting
        assert setting is not None and self.extents is not None
        length = cache.get_seq_length()
        cache.reserve_rows(len(tokens), length + 1)
        step = step_in(cache, self.model, self.step, router_of(setting))
        if step is not self.captured or ending:
            step.turn(self.extents, len(tokens))
            positions = (self.last + self.passed).expand(len(tokens), 1)[:, 0]
            step.begin(Begin(tokens[:, 0], positions, length, self.k_start, *ending))
        self.captured = None if ending else step
        return step

    def _count(self, tokens: int) -> None:
        assert self.extents is not None
        self.cache.advance(tokens, self.extents.kv_heads)

    def _by_forward(self, tokens: Tensor) -> Tensor:
        self.captured = None
        return super()._by_forward(tokens)

    def ahead(
        self,
        tokens: Tensor,
        most: int,
        unfinished: Tensor,
        ending: list[Tensor],
        config: GenerationConfig,
    ) -> tuple[Tensor, Tensor, bool]:
        B, length = len(tokens), self.cache.get_seq_length()
        if not self._is_served(B):
            return super().ahead(tokens, most, unfinished, ending, config)
        self.passed += 1  # the position of the first
        ends = torch.cat([end.flatten().to(tokens.device) for end in ending]) if ending else None
        captured = self._begun(tokens, unfinished[:, 0], ends, config._pad_token_tensor)
        self.passed -= 1
        most, setting = min(most, self.cache.tokens - length), self.setting
        flags = _Late(captured.state.going) if ending else None
        made, last = 0, None
        while made < most and last is None and self._is_served(B) and self.setting is setting:
            if self.holding is not None:
                self.holding.start()
            captured()
            made += 1
            if self.holding is not None:
                self.holding.stop()
            if flags is not None:
                flags.put()
                last = flags.first_end(made - _LATE)
        if flags is not None and last is None:
            last = flags.first_end(made)
        if self.holding is not None:
            self.holding.forget(made - (last or made))
        made = last or made
        self.passed += made
        self._count(made)
        state = captured.state
        return (
            state.made[:B, length : length + made].clone(),
            state.unfinished[:B, None].clone(),
            last is not None,
        )


class _Late:
    """A flag on a device, which the host reads some steps after each has written it, so that it does not wait."""

    def __init__(self, flag: Tensor) -> None:
        self.flag, self.written, self.read = flag, 0, 0
        self.copies = torch.zeros(_LATE + 1, dtype=flag.dtype, pin_memory=flag.is_cuda)
        self.events = [torch.cuda.Event() for _ in self.copies] if flag.is_cuda else []

    def put(self) -> None:
        """Ask for a copy of the flag as it is now."""
        place = self.written % len(self.copies)
        self.copies[place : place + 1].copy_(self.flag, non_blocking=True)
        if self.events:
            self.events[place].record(torch.cuda.current_stream(self.flag.device))
        self.written += 1

    def first_end(self, upto: int) -> int | None:
        """The number of the first copy that is 0 among the first ``upto``, counted from 1; waits for these."""
        while self.read < upto:
            place = self.read % len(self.copies)
            if self.events:
                self.events[place].synchronize()
            self.read += 1
            if not self.copies.numpy()[place]:
                return self.read
        return None
