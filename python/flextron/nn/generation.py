"""The loop of greedy and sampled generation on a CPU: a token costs its decode step and little else.

transformers' own loop prepares and unpacks every forward anew, at the cost of a fifth of a token where that is short.
Prompts, processors, criteria and streamers are transformers' here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from flextron.config import Widths
from flextron.nn.cache import ElasticCache
from flextron.nn.forward import ElasticForward, Used, first_key

_TAKEN = ("cache", "use_cache", "attention_mask", "position_ids", "logits_to_keep")
_AHEAD = 64  # positions whose rotary tables are made at once


def is_plain(model: Any, input_ids: Tensor, config: Any, inputs: dict[str, Any]) -> bool:
    """Whether `sample` gives what transformers' loop gives for a new prompt."""
    cache = inputs.get("cache")
    return (
        input_ids.device.type == "cpu"
        and input_ids.numel() > 0
        and isinstance(cache, ElasticCache)
        and cache.get_seq_length() == 0
        and inputs.get("use_cache") is True
        and inputs.get("logits_to_keep", 1) == 1
        and not any(value is not None for name, value in inputs.items() if name not in _TAKEN)
        and not (config.output_attentions or config.output_hidden_states or config.is_assistant)
        and config.prefill_chunk_size is None
        and "forward" not in model.__dict__  # nobody has put another in its place
    )


def sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    config: Any,
    streamer: Any,
    inputs: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput:
    """Continue the sequences of input_ids [B, T] until the criteria end them all."""
    logits = model(input_ids=input_ids, **inputs).logits
    steps = _Steps(model, input_ids.shape, inputs)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(input_ids.shape[0], 1, dtype=torch.bool)
    asked = config.return_dict_in_generate
    scores = () if asked and config.output_scores else None
    raw = () if asked and config.output_logits else None
    while True:
        last = logits[:, -1].float()
        ranked = logits_processor(input_ids, last)
        if scores is not None:
            scores += (ranked,)
        if raw is not None:
            raw += (last,)
        drawn = config.do_sample
        tokens = torch.multinomial(ranked.softmax(-1), 1) if drawn else ranked.argmax(-1, keepdim=True)
        if ends:
            tokens = tokens.where(unfinished, config._pad_token_tensor)
        input_ids = torch.cat([input_ids, tokens], 1)
        unfinished = unfinished & ~stopping_criteria(input_ids, scores)[:, None]
        if streamer is not None:
            streamer.put(tokens[:, 0])
        if not unfinished.any():
            break
        logits = steps(tokens)
    if streamer is not None:
        streamer.end()
    if not asked:
        return input_ids
    return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, logits=raw, cache=inputs["cache"])


class _Steps:
    """The logits of one token after another.

    Of what may change between tokens a budget and the model's hooks are seen at once, hooks of its modules with the
    next budget.
    """

    def __init__(self, model: Any, prompt: torch.Size, inputs: dict[str, Any]) -> None:
        self.model, self.cache, self.step = model, inputs["cache"], ElasticForward.of(model)
        self.widths: Widths | None = None
        self.used: Used | None = None
        self.mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        self.k_start = None if self.mask is None else first_key(self.mask)
        self.position = torch.arange(prompt[1])[None, -1:] if positions is None else positions[:, -1:]
        # where the tables depend on the longest position that was asked for, none may be made ahead
        dynamic = model.model.rotary_emb.rope_type in ("dynamic", "longrope")
        self.ahead = torch.arange(1 if dynamic else _AHEAD)
        self.tables: tuple[Tensor, Tensor] = ()
        self.at = len(self.ahead)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [B, 1, V] after the tokens [B, 1]."""
        model, step = self.model, self.step
        self.position = self.position + 1
        if model.widths is not self.widths:  # set anew, which a criterion or streamer may do between tokens
            self.widths = model.widths
            self.used = step.used(model, len(tokens))
            self.cache.check(self.used.kv_heads if self.used else ())
        hooked = model._forward_hooks or len(model._forward_pre_hooks) > 1  # one of those guards the cache
        if self.used is None or hooked:
            return self._by_forward(tokens)
        if self.at == len(self.ahead):
            self.at, self.tables = 0, model.model.rotary_emb(step.norm, self.position + self.ahead)
        cos, sin = (table[:, self.at : self.at + 1] for table in self.tables)
        self.at += 1
        return step(model, tokens, cos, sin, self.cache, self.k_start, 1, self.used)

    def _by_forward(self, tokens: Tensor) -> Tensor:
        self.at = len(self.ahead)
        mask = self.mask
        if mask is not None:
            new = self.cache.get_seq_length() + 1 - mask.shape[1]
            mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
        model = self.model
        return model(tokens, attention_mask=mask, position_ids=self.position, cache=self.cache).logits
