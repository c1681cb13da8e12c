"""Log-likelihoods of many continuations, where tokens that several have in common are computed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Pair = tuple[list[int], list[int]]
Answer = tuple[float, bool]


@torch.no_grad()
def log_likelihoods(model: Any, pairs: Sequence[Pair], longest: int, batch_size: int = 8) -> list[Answer]:
    """The log-likelihood of each continuation after its context, in nats, and whether greedy decoding says it.

    A question's answers run side by side behind the question, which runs once; of questions that begin alike, such as
    those of a subject behind the same examples, the beginning runs once. Contexts with one continuation run in batches.

    Args:
        model: a transformers causal LM, in eval mode.
        pairs: (context, continuation) as token ids, at least one of each.
        longest: tokens that the model may be given; what a pair has more is left out at its beginning.
        batch_size: contexts in a batch.
    """
    found: list[Answer] = [(0.0, False)] * len(pairs)
    ends = [end for _, end in pairs]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (context, end) in enumerate(pairs):
        groups.setdefault(tuple((context + end)[-longest - 1 : -len(end)]), []).append(i)

    def answer(i: int, log_p: Tensor) -> None:
        """``log_p``: [n, V], the predictions of a continuation's tokens."""
        wanted = torch.tensor(ends[i], device=log_p.device)
        chosen = log_p.gather(1, wanted[:, None])
        found[i] = float(chosen.sum()), bool((log_p.argmax(-1) == wanted).all())

    alone = sorted(([*c], i) for c, (i, *more) in groups.items() if not more)
    alone.sort(key=lambda one: len(one[0]) + len(ends[one[1]]))
    for start in range(0, len(alone), batch_size):
        batch = alone[start : start + batch_size]
        rows = _padded(model, [context + ends[i][:-1] for context, i in batch])
        keep = (
            rows.shape[1] + 1 - min(len(context) for context, _ in batch)
        )  # predictions, from the first wanted
        log_p = model(input_ids=rows, use_cache=False, logits_to_keep=keep).logits.float().log_softmax(-1)
        for own, (context, i) in zip(log_p, batch, strict=True):
            begin = len(context) - 1 - (rows.shape[1] - keep)
            answer(i, own[begin : begin + len(ends[i])])

    cache, before = None, ()  # of the context before
    for context in sorted(c for c, several in groups.items() if len(several) > 1):
        shared = min(_common(before, context), len(context) - 1) if cache and cache.is_croppable else 0
        if shared:
            cache.crop(shared - len(before))
        own = _padded(model, [[*context[shared:]]])
        out = model(input_ids=own, cache=cache if shared else None, use_cache=True, logits_to_keep=1)
        cache, before = out.cache, context
        first = out.logits[0].float().log_softmax(-1)  # [1, V]
        for i in groups[context]:
            if len(ends[i]) == 1:
                answer(i, first)
        longer = [i for i in groups[context] if len(ends[i]) > 1]
        if longer:
            beside = copy.deepcopy(cache)
            beside.batch_repeat_interleave(len(longer))
            rows = _padded(model, [ends[i][:-1] for i in longer])
            rest = model(input_ids=rows, cache=beside, use_cache=True).logits.float().log_softmax(-1)
            for i, more in zip(longer, rest, strict=True):
                answer(i, torch.cat([first, more[: len(ends[i]) - 1]]))
    return found


def _padded(model: Any, rows: list[list[int]]) -> Tensor:
    """Rows side by side: no token sees the padding, which is behind all that count."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
