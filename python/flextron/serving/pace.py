"""The steps of a host's batch, measured beside the tables, and the rung at which each request with a deadline goes on.

Knows nothing of vLLM. A latency table is of one request alone; in a batch the costs of all requests are added up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from flextron.config import Widths
from flextron.nn.deadline import SPARE, WINDOW, Clock, Controller, slowdown_of

clock: Clock = time.monotonic  # the one that all processes of a machine share


class Cost(NamedTuple):
    """Milliseconds by the tables, of one request alone.

    Attributes:
        token: for each token of its prompt.
        step: for a decode step.
    """

    token: float
    step: float

    def of(self, tokens: int) -> float:
        """What a forward of so many tokens takes: a few take as long as one."""
        return max(self.step, tokens * self.token)


@dataclass(eq=False)
class Request:
    """A request of a batch.

    Attributes:
        widths: that its next step keeps.
        prompt: tokens that are still to be taken in before the first new one.
        new: tokens that may still come.
        end: when the answer is to be whole, in seconds of `clock`; None: whenever.
        cost: of its widths; None until a `Pace` has seen it.
    """

    widths: Widths
    prompt: int = 0
    new: int = 0
    end: float | None = None
    cost: Cost | None = field(default=None, init=False)
    controller: Controller | None = field(default=None, init=False)  # of one with an end


class Pace:
    """How much slower than the tables steps are now, and what this means for requests with a deadline.

    A step's slowdown is its time, from the beginning of its forward to that of the next, over the sum of its requests'
    costs. It counts only if one of them goes on, for a host with nothing to do waits. A request with a deadline begins
    at the highest rung whose prompt and new tokens fit in; with each step a `Controller` moves it, by what is left for
    each of its tokens. There all requests with deadlines are taken to move in proportion, and the others to stay.

    Args:
        rungs: sub-networks, each covering the one before, with their costs.
        cost: of any widths.
        now: seconds.
    """

    def __init__(
        self,
        rungs: Sequence[tuple[Widths, Cost]],
        cost: Callable[[Widths], Cost],
        now: Clock = clock,
    ) -> None:
        self.rungs, self.cost, self.now = rungs, cost, now
        self.slowdowns: deque[float] = deque(maxlen=WINDOW)
        self._last: tuple[float, float, list[Request]] | None = None  # began, cost, requests

    def begin(self, request: Request, others: Sequence[Request]) -> None:
        """A request joins others."""
        if request.end is not None:
            slowdown, beside = slowdown_of(self.slowdowns), sum(_cost(each).step for each in others)
            left = (1 - SPARE) * 1e3 * (request.end - self.now())

            def whole(cost: Cost) -> float:
                return slowdown * (cost.of(request.prompt) + request.new * (cost.step + beside))

            within = [i for i, (_, cost) in enumerate(self.rungs) if whole(cost) <= left]
            request.controller = Controller([cost.step for _, cost in self.rungs], 0, self.slowdowns)
            self._turn(request, max(within, default=0))
        else:
            request.cost = self.cost(request.widths)

    def step(self, requests: Sequence[Request], tokens: Sequence[int]) -> None:
        """A forward of so many tokens of each request begins; those with deadlines get their widths for it."""
        now = self.now()
        if self._last is not None:
            began, cost, before = self._last
            if any(request in before for request in requests):
                self.slowdowns.append(1e3 * (now - began) / cost)
                self._move(requests, now)
        cost = sum(_cost(request).of(n) for request, n in zip(requests, tokens, strict=True))
        for request, n in zip(requests, tokens, strict=True):
            request.new -= request.prompt <= n  # after its last token a prompt gives the first new one
            request.prompt = max(0, request.prompt - n)
        self._last = now, cost, list(requests)

    def _move(self, requests: Sequence[Request], now: float) -> None:
        """After a step, let requests with deadlines that write tokens go on at the rung that their time allows."""
        moving = [request for request in requests if request.end is not None and not request.prompt]
        own = sum(_cost(request).step for request in moving)
        fixed = sum(_cost(request).step for request in requests) - own
        before = [_cost(request).step for request in moving]
        for request, cost in zip(moving, before, strict=True):
            assert request.end is not None and request.controller is not None
            each = (1 - SPARE) * 1e3 * (request.end - now) / max(request.new, 1)
            limit = (each - slowdown_of(self.slowdowns) * fixed) * cost / own
            self._turn(
                request, request.controller.step(request.controller.rung, self.slowdowns[-1] * cost, limit)
            )

    def _turn(self, request: Request, rung: int) -> None:
        assert request.controller is not None
        request.controller.rung = rung
        request.widths, request.cost = self.rungs[rung]


def _cost(request: Request) -> Cost:
    assert request.cost is not None, "a request must have begun"
    return request.cost
