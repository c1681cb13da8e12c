"""The requests of a host's batch: who is where, and what the layers keep of each one's tokens.

Knows nothing of vLLM. A host's batch is one row of tokens, request after request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flextron.config import ElasticConfig, Widths
from flextron.nn.policy import AxisDecision, Decision, Dial, Policy
from flextron.nn.setting import Setting
from flextron.serving.pace import Pace, Request


class Packed(Policy):
    """Requests one after another in one row, each with tokens and widths of its own.

    Args:
        widths: one for each of R requests.
        lengths: their numbers of tokens, which add up to those of the row.
        device: the model's.
    """

    def __init__(self, widths: Sequence[Widths], lengths: Sequence[int], device: torch.device) -> None:
        tokens = torch.tensor(lengths, device=device)
        by_axis = zip(*(w.axes for w in widths), strict=True)
        self.rows = [_of_layers(own, tokens, sum(lengths)) for own in by_axis]

    def __call__(self, x: Tensor, layer: int) -> Decision:
        return Decision(*(AxisDecision(layers[layer]) for layers in self.rows))


def _of_layers(own: Sequence[Sequence[int]], tokens: Tensor, total: int) -> tuple[Tensor, ...]:
    """Widths [R][L] as one extent for each token, [N] int64, of each layer."""
    rows = torch.tensor(own, device=tokens.device).T
    return rows.repeat_interleave(tokens, dim=1, output_size=total).unbind()


class Batch:
    """The requests of a host's batch, by place, and the setting of its next forward.

    Args:
        config: of the model.
        device: the model's.
        pace: holds deadlines; None: no request may have one.
    """

    def __init__(self, config: ElasticConfig, device: torch.device, pace: Pace | None = None) -> None:
        self.config, self.device, self.pace = config, device, pace
        self._requests: dict[int, Request] = {}
        self._last: tuple[object, Setting] | None = None

    def update(
        self,
        removed: Iterable[int],
        added: Iterable[tuple[int, Request]],
        moved: Iterable[tuple[int, int, bool]],
    ) -> None:
        """What changed since the last forward: places left, taken, and (from, to, whether both change places)."""
        for place in removed:
            self._requests.pop(place, None)
        for place, request in added:
            if self.pace is not None:
                others = [other for at, other in self._requests.items() if at != place]
                self.pace.begin(request, others)
            self._requests[place] = request
        for start, end, swapped in moved:
            going, coming = self._requests.pop(start, None), self._requests.pop(end, None)
            if going is not None:
                self._requests[end] = going
            if swapped and coming is not None:
                self._requests[start] = coming

    def setting(self, lengths: Sequence[int], tokens: int) -> Setting:
        """What a forward keeps of the tokens of the first ``len(lengths)`` places; with each call a forward begins.

        Only the key/value groups that a request may need, now or later, are projected and cached in each layer: those
        of its budget, and all where it has a deadline, for then its widths may rise.

        Args:
            lengths: the number of tokens of each place.
            tokens: those of the whole row; what follows the last request is padding.
        """
        requests = [self._requests[place] for place in range(len(lengths))]
        if self.pace is not None:
            self.pace.step(requests, lengths)
        widths = [request.widths for request in requests]
        stored = self.config.full() if any(request.end is not None for request in requests) else None
        if tokens > sum(lengths):
            widths, lengths = [*widths, self.config.smallest()], [*lengths, tokens - sum(lengths)]
        key = (tuple(widths), tuple(lengths), stored)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._made(widths, lengths, stored))
        return self._last[1]

    def whole(self, widths: Widths) -> Setting:
        """The setting of a row whose tokens all have these widths."""
        return self._made([widths], [1])

    def _made(
        self, widths: Sequence[Widths], lengths: Sequence[int], stored: Widths | None = None
    ) -> Setting:
        bound = Widths.largest(widths)
        same = all(own == bound for own in widths)
        policy = None if same else Packed(widths, lengths, self.device)
        groups = tuple(self.config.kv_heads(n, "selected") for n in (stored or bound).heads)
        return Setting(Dial((bound,), "selected"), bound, "selected", groups, policy)
