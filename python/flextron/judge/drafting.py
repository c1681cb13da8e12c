"""What drafting brings: how many drafted tokens are accepted, and tokens per second with a draft and without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from flextron.judge.timing import Comparison, NoiseWatch, compare, wall_clock
from flextron.nn.drafting import Drafted
from flextron.nn.protocol import Elastic

Progress = Callable[[str, int, int], Any]
_AT_ONCE = 2  # tokens that are drafted to judge a draft by, whether they pay or not


def judge_drafts(
    model: Elastic,
    prompts: Mapping[str, Tensor],
    drafts: Sequence[float],
    *,
    tokens: int = 64,
    batch: int = 1,
    rounds: int = 3,
    progress: Progress = lambda *_: None,
) -> list[dict[str, Any]]:
    """Greedy generation of the full model with each draft budget, on each set of prompts.

    Args:
        model: from `from_pretrained`, profiled.
        prompts: sets by name, [n, length] int64 each.
        drafts: fractions of the full model's decode latency.
        tokens: generated of each prompt; nothing ends it before.
        batch: prompts that are continued side by side.
        rounds: samples of each time; both ways are interleaved.

    Returns:
        For each set and draft: ``prompts``, ``draft``; of two tokens drafted in every round, ``acceptance`` and the
        counts of `Drafted`; of as many as pay, ``tokens_per_s``, beside ``plain_tokens_per_s`` without a draft, and
        their ratio ``speedup`` with its ``spread``, half the distance between the quartiles; whether all tokens were
        the ``same``; and ``disturbed``, the sentence that says why the times mean nothing, or None.
    """
    pad = model.generation_config.pad_token_id
    settings = dict(
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0 if pad is None else pad,
        eos_token_id=model.elastic.vocab_size,  # no token is
        return_dict_in_generate=True,
    )
    found = []
    with model.budget(1.0):
        for name, ids in prompts.items():
            parts = ids.to(model.device).split(batch)

            def run(
                draft: float | None, at_once: int | None = None, parts: Sequence[Tensor] = parts
            ) -> list[Any]:
                given: dict[str, Any] = settings | {"draft_budget": draft, "draft_tokens": at_once}
                return [model.generate(part, attention_mask=torch.ones_like(part), **given) for part in parts]

            plain = torch.cat([each.sequences for each in run(None)])
            for draft in drafts:
                drafted, counts = run(draft, _AT_ONCE), Drafted()
                for each in drafted:
                    counts += each.drafted
                drafted += run(draft)
                watch = NoiseWatch.on(model.device)
                timing, compared = compare(
                    ("plain", lambda: run(None)),
                    {"drafted": lambda draft=draft: run(draft)},  # type: ignore[misc]
                    rounds,
                    0.0,
                    on_round=lambda done, name=name, draft=draft: progress(  # type: ignore[misc]
                        f"{name}, draft {draft:g}", done, rounds
                    ),
                    clock=wall_clock,
                )
                rate, ratio = len(ids) * tokens / timing.median, compared["drafted"].ratio
                found.append(
                    {
                        "prompts": name,
                        "draft": draft,
                        "acceptance": counts.acceptance,
                        **asdict(counts),
                        "tokens_per_s": rate / ratio,
                        "plain_tokens_per_s": rate,
                        "speedup": 1 / ratio,
                        "spread": Comparison.of([1 / r for r in compared["drafted"].ratios]).half_spread,
                        "disturbed": watch.noise(timing.samples).sentence,
                        "same": torch.equal(
                            plain.repeat(2, 1), torch.cat([each.sequences for each in drafted])
                        ),
                    }
                )
    return found
