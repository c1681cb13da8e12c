"""What a model is set to: its own setting, which all threads see, and one of a block or a call, which its thread sees.

The modules look it up in every forward, so that calls of several threads on one model keep their own budgets.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from flextron.config import Widths
from flextron.nn.policy import Decision, Dial, Policy
from flextron.nn.router import Choices


@dataclass(frozen=True, eq=False)
class Setting:
    """What the layers keep.

    Attributes:
        dial: what the model was turned to.
        widths: of every layer; of several requests or tokens, at most.
        kv: ``"selected"`` or ``"all"``: which key/value groups are projected and cached.
        kv_heads: how many these are in each layer.
        policies: what decides in each layer; None: the widths.
        seen: None, or where the router's choices are written down: (layer, choices).
    """

    dial: Dial
    widths: Widths
    kv: str
    kv_heads: tuple[int, ...]
    policies: tuple[Policy | None, ...]
    seen: list[tuple[int, Choices]] | None = None


class Settings:
    """A model's own `Setting`, and in its stead that of the block or call which runs, if there is one.

    That one belongs to the context (`contextvars`): to a thread, and to a task of `asyncio`. A compiler cannot read a
    context, so a compiled forward reads the same from the thread.
    """

    own: Setting

    def __init__(self) -> None:
        self._context: ContextVar[Setting | None] = ContextVar("flextron.setting", default=None)
        self._begun: ContextVar[Setting | None] = ContextVar("flextron.begun", default=None)
        self._thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"own": self.now()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.own = state["own"]

    def now(self) -> Setting:
        return self.local() or (None if torch.compiler.is_compiling() else self._begun.get()) or self.own

    def local(self) -> Setting | None:
        """That of the block or call which runs."""
        if torch.compiler.is_compiling():
            return getattr(self._thread, "setting", None)
        return self._context.get()

    def put(self, setting: Setting) -> None:
        """Be set to this: inside a block or call until its end, elsewhere for good and in all threads."""
        if self._context.get() is None:
            self.own = setting
            if self._begun.get() is not None:
                self._begun.set(setting)
        else:
            self._context.set(setting)
            self._thread.setting = setting

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """A forward, whose layers all see the model's own setting as it was at its beginning.

        What another thread sets meanwhile comes with the next one.
        """
        token = self._begun.set(self.own)
        try:
            yield
        finally:
            self._begun.reset(token)

    @contextlib.contextmanager
    def block(self, setting: Setting | None = None) -> Iterator[None]:
        """A block whose setting is its own, at first this one, or the one outside."""
        before = getattr(self._thread, "setting", None)
        token = self._context.set(setting or self.now())
        self._thread.setting = self._context.get()
        try:
            yield
        finally:
            self._context.reset(token)
            self._thread.setting = before

    def hand_on(self, layer: int, decision: Decision) -> None:
        """What was decided in a layer's attention, for the MLP that this thread runs next."""
        self._thread.decided = layer, decision

    def decided(self, layer: int) -> Decision:
        """What this thread decided last, which must be of this layer."""
        of, decision = getattr(self._thread, "decided", (None, None))
        if of != layer:
            raise RuntimeError(
                f"flextron: the MLP of layer {layer} must run after its attention, got that of layer {of} before it"
            )
        return decision
