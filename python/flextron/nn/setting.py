"""What a model is set to: its own setting, which every thread sees, and that of a block or call, seen by its thread.

A setting is made once per change of the budget. The modules look it up in every forward and read their layer's entry,
so calls of several threads on one model keep to their own budgets.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flextron.config import Widths
from flextron.nn.deadline import Held
from flextron.nn.policy import BY_WIDTH, AxisDecision, Decision, Dial, Policy
from flextron.nn.router import Indices
from flextron_ext import DecoderStep


@dataclass(frozen=True, eq=False)
class Setting:
    """What the layers keep.

    Attributes:
        dial: what the model was turned to.
        widths: the width of every layer; where requests or tokens differ, the largest.
        kv: ``"selected"`` or ``"all"``: which key/value groups are projected and cached.
        kv_heads: the number of these groups in each layer.
        policy: decides where requests or tokens differ; None: all keep the widths.
        watched: None, or a list that gets the router's choices of one layer after another.
    """

    dial: Dial
    widths: Widths
    kv: str
    kv_heads: tuple[int, ...]
    policy: Policy | None
    watched: list[Indices] | None = None

    def extents(self, B: int) -> DecoderStep | None:
        """What the decoder op is to keep of B sequences; None where only the modules can do what is set."""
        if self.policy is None:
            return DecoderStep(self.widths.mlp, self.widths.heads, self.kv_heads)
        return None if self.watched is not None else self.policy.extents(B, self.kv_heads)

    def decide(self, x: Tensor, layer: int) -> Decision:
        """What a layer keeps of each token of x [B, T, K], its normalised input."""
        if self.policy is None:
            return BY_WIDTH
        decision = self.policy(x, layer)
        if self.watched is not None:  # then a router chooses for every token
            self.watched.append(Indices(*(cast(Tensor, axis.choice).view(x.shape[:2]) for axis in decision)))
        return decision

    def by_width(self, part: str) -> AxisDecision:
        """The decision of a part whose layer hands it none, and which can therefore only keep to the widths."""
        if self.policy is not None:
            raise RuntimeError(
                f"flextron: {part} must be called with a decision where requests or tokens have widths of their own, "
                "got none; the layer's forward must be that of flextron.nn.make_elastic"
            )
        return BY_WIDTH.mlp


class Settings:
    """A model's own `Setting`, and the one of a running block or call, which takes precedence.

    A block's setting belongs to its context (`contextvars`), so to one thread or one task of `asyncio`. torch.compile
    cannot read a context, so a compiled forward reads a copy that is kept per thread.
    """

    own: Setting

    def __init__(self) -> None:
        self._context: ContextVar[Setting | None] = ContextVar("flextron.setting", default=None)
        self._begun: ContextVar[Setting | None] = ContextVar("flextron.begun", default=None)
        self._held: ContextVar[Held | None] = ContextVar("flextron.held", default=None)
        self._thread = threading.local()

    @property
    def held(self) -> Held | None:
        """The last generation of this thread or task that was held to a deadline."""
        return self._held.get()

    @held.setter
    def held(self, held: Held) -> None:
        self._held.set(held)

    def __getstate__(self) -> dict[str, Any]:
        return {"own": self.now()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Settings.__init__(self)
        self.own = state["own"]

    def now(self) -> Setting:
        return self.local() or (None if torch.compiler.is_compiling() else self._begun.get()) or self.own

    def local(self) -> Setting | None:
        """The setting of the running block or call, if there is one."""
        if torch.compiler.is_compiling():
            return getattr(self._thread, "setting", None)
        return self._context.get()

    def put(self, setting: Setting) -> None:
        """Change the setting: inside a block or call until it ends, elsewhere for good and for all threads."""
        if self._context.get() is None:
            self.own = setting
            if self._begun.get() is not None:
                self._begun.set(setting)
        else:
            self._context.set(setting)
            self._thread.setting = setting

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """The length of a forward: its layers all see the model's own setting as it was at the beginning.

        What another thread sets meanwhile takes effect in the next forward.
        """
        token = self._begun.set(self.own)
        try:
            yield
        finally:
            self._begun.reset(token)

    @contextlib.contextmanager
    def block(self, setting: Setting | None = None) -> Iterator[None]:
        """A block with a setting of its own, which starts as the given one, or as the one outside."""
        before = getattr(self._thread, "setting", None)
        token = self._context.set(setting or self.now())
        self._thread.setting = self._context.get()
        try:
            yield
        finally:
            self._context.reset(token)
            self._thread.setting = before
