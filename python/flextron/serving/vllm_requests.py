"""The budgets of requests, as vLLM's runner tells of them: a processor of logits that changes none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from flextron.serving import served
from flextron.serving.budgets import budget_of
from flextron.serving.middleware import ARRIVED
from flextron.serving.pace import Request, clock

logger = init_logger("vllm.flextron")


class BudgetOfRequests(LogitsProcessor):
    """Told of requests that come, move and go before each forward; keeps the table of widths that the model reads."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request's budget where it is accepted, in the server's process.

        Raises:
            ValueError: it is none, or an impossible one.
        """
        served.offer().widths(sampling_params.extra_args or {})

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        served.batch().update(
            batch_update.removed,
            [(place, _request(*of_request)) for place, *of_request in batch_update.added],
            [(start, end, how == MoveDirectionality.SWAP) for start, end, how in batch_update.moved],
        )


def _request(params: SamplingParams, prompt: Sequence[int] | None, written: Sequence[int]) -> Request:
    """A request that joins the batch; one that vLLM had set aside has written tokens, which it takes in again."""
    offer, given = served.offer(), params.extra_args or {}
    request = Request(offer.widest, len(prompt or ()) + len(written), (params.max_tokens or 1) - len(written))
    try:
        request.widths, deadline = offer.widths(given), budget_of(given).get("deadline_ms")
    except ValueError as error:  # `validate_params` took it; an error here would end every request
        logger.error("flextron: the full model runs for a request, for %s", error)
        return request
    if deadline is not None:
        request.end = given.get(ARRIVED, clock()) + deadline / 1e3
    return request
