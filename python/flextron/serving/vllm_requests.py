"""The budgets of requests, as vLLM's runner tells of them: a processor of logits that changes none."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from flextron.config import Widths
from flextron.serving import served

logger = init_logger("vllm.flextron")


class BudgetOfRequests(LogitsProcessor):
    """Told of requests that come, move and go before each forward; keeps the table of widths that the model reads."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request's budget where it is accepted, in the server's process.

        Raises:
            ValueError: it is none, or an impossible one.
        """
        served.offer().widths(sampling_params.extra_args or {}, new=sampling_params.max_tokens or 0)

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
            [(place, _widths(params, prompt)) for place, params, prompt, _ in batch_update.added],
            [(start, end, how == MoveDirectionality.SWAP) for start, end, how in batch_update.moved],
        )


def _widths(params: SamplingParams, prompt: Any) -> Widths:
    offer = served.offer()
    try:
        return offer.widths(params.extra_args or {}, len(prompt or ()), params.max_tokens or 0)
    except ValueError as error:  # `validate_params` took it; an error here would end every request
        logger.error("flextron: the full model runs for a request, for %s", error)
        return offer.widest
