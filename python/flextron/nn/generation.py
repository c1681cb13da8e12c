"""The loop of greedy and sampled generation on a CPU: a token costs its decode step and little else.

transformers' own loop prepares and unpacks every forward anew, which takes a fifth of a short decode step. Logits
processors, stopping criteria and streamers are transformers' here too.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from flextron.nn.cache import ElasticCache
from flextron.nn.forward import ElasticForward, is_known, is_transformed, runs_on
from flextron.nn.masks import first_keys, is_left_padded
from flextron.nn.protocol import Elastic
from flextron.nn.setting import Setting
from flextron_ext import DecoderStep

_TAKEN = ("cache", "use_cache", "attention_mask", "position_ids", "logits_to_keep")
# methods of transformers' loop whose work this one does itself
_CALLED = (
    "forward",
    "__call__",
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_prefill",
    "_sample",
)
_AHEAD = 64  # positions whose rotary tables are made at once


def is_plain(model: Elastic, input_ids: Tensor, config: GenerationConfig, inputs: dict[str, Any]) -> bool:
    """Whether `sample` returns what transformers' loop would return for a new prompt."""
    cache, mask, positions = (inputs.get(name) for name in ("cache", "attention_mask", "position_ids"))
    return (
        runs_on(input_ids.device)
        and input_ids.numel() > 0
        and isinstance(cache, ElasticCache)
        and cache.get_seq_length() == 0
        and (mask is None or mask.shape == input_ids.shape)
        # a mask longer than the prompt brings more positions with it
        and (positions is None or positions.shape[-1] == input_ids.shape[1])
        and inputs.get("use_cache") is True
        and inputs.get("logits_to_keep", 1) == 1
        and not any(value is not None for name, value in inputs.items() if name not in _TAKEN)
        and not (config.output_attentions or config.output_hidden_states or config.is_assistant)
        and config.prefill_chunk_size is None
        and not any(map(_is_replaced, repeat(model), _CALLED))
        and not is_transformed()
    )


def _is_replaced(model: Elastic, name: str) -> bool:
    """Whether a method was replaced, on the model (as PEFT does) or in a subclass of transformers' class."""
    own = model.__dict__.get(name)
    return not is_known(getattr(model.stock, name)) or (
        own is not None and getattr(own, "__func__", None) is not getattr(type(model), name)
    )


def sample(
    model: Elastic,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    inputs: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput:
    """Continue the sequences of input_ids [B, T] until the criteria end them all."""
    logits = model(input_ids=input_ids, **inputs).logits
    steps = _Steps(model, input_ids.shape, inputs)
    try:
        return _continued(
            steps, logits, input_ids, logits_processor, stopping_criteria, config, streamer, inputs["cache"]
        )
    finally:
        steps.end()


def _continued(
    steps: _Steps,
    logits: Tensor,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    cache: ElasticCache,
) -> Tensor | GenerateDecoderOnlyOutput:
    """The loop, from the prompt's logits [B, .., V] on."""
    best = None
    lengths, others = _split(stopping_criteria)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in others)
    unfinished = torch.ones(input_ids.shape[0], 1, dtype=torch.bool)
    asked = config.return_dict_in_generate
    scores: tuple[Tensor, ...] | None = () if asked and config.output_scores else None
    raw: tuple[Tensor, ...] | None = () if asked and config.output_logits else None
    plain = not (config.do_sample or logits_processor or scores is not None or raw is not None)
    while True:
        if best is None or not plain:
            last = logits[:, -1].float()
            ranked = logits_processor(input_ids, last)
            if scores is not None:
                scores += (ranked,)
            if raw is not None:
                raw += (last,)
            drawn = config.do_sample
            tokens = torch.multinomial(ranked.softmax(-1), 1) if drawn else ranked.argmax(-1, keepdim=True)
        else:
            tokens = best[:, None]
        if ends:
            tokens = tokens.where(unfinished, config._pad_token_tensor)
        input_ids = torch.cat([input_ids, tokens], 1)
        is_done = any(input_ids.shape[1] >= length.max_length for length in lengths)
        if others:
            unfinished = unfinished & ~others(input_ids, scores)[:, None]
            is_done = is_done or not unfinished.any()
        if streamer is not None:
            streamer.put(tokens[:, 0])
        if is_done:
            break
        logits, best = steps(tokens)
    if streamer is not None:
        streamer.end()
    if not asked:
        return input_ids
    return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, logits=raw, cache=cache)


def _split(criteria: StoppingCriteriaList) -> tuple[list[MaxLengthCriteria], StoppingCriteriaList]:
    """(criteria of length, which one integer decides; all others).

    A length beyond the model's own counts among the others, because transformers' criterion then warns.
    """
    if type(criteria) is not StoppingCriteriaList:
        return [], criteria

    def by_integer(criterion: StoppingCriteria) -> bool:
        if type(criterion) is not MaxLengthCriteria:
            return False
        longest = criterion.max_position_embeddings
        return longest is None or criterion.max_length <= longest

    lengths = [criterion for criterion in criteria if by_integer(criterion)]
    return lengths, StoppingCriteriaList(criterion for criterion in criteria if not by_integer(criterion))


class _Steps:
    """The logits of one token after another, and their arg-max.

    A new budget or a hook on the model takes effect at the next token; a hook on a submodule only when the budget is
    set again.
    """

    def __init__(self, model: Elastic, prompt: torch.Size, inputs: dict[str, Any]) -> None:
        self.model, self.cache, self.step = model, inputs["cache"], ElasticForward.of(model)
        self.setting: Setting | None = None
        self.extents: DecoderStep | None = None
        self.mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        self.order: Tensor | None = None
        if self.mask is not None and not is_left_padded(self.mask):
            self._hide_first(self.mask)
        self.k_start = None if self.mask is None else first_keys(self.mask)
        self.last = torch.arange(prompt[1])[None, -1:] if positions is None else positions[:, -1:]
        self.passed = 0  # tokens since that position
        # RoPE tables that depend on the longest position asked for must not be made ahead
        dynamic = model.model.rotary_emb.rope_type in ("dynamic", "longrope")
        self.ahead = torch.arange(1 if dynamic else _AHEAD)
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
        model, step = self.model, self.step
        self.passed += 1
        setting = model.settings.now()
        if setting is not self.setting:  # a criterion or streamer may set a budget between tokens
            self.setting = setting
            self.extents = step.extents(model, len(tokens))
            self.cache.check(self.extents.kv_heads if self.extents else ())
        hooked = (
            model._forward_hooks or len(model._forward_pre_hooks) > 1
        )  # one of the latter is ours: `_guard_cache`
        if self.extents is None or hooked:
            return self._by_forward(tokens), None
        if not self.tables:
            tables = model.model.rotary_emb(step.norm, self.last + self.passed + self.ahead)
            self.tables = list(zip(*(table.split(1, dim=1) for table in tables), strict=True))[::-1]
        return step(model, tokens, *self.tables.pop(), self.cache, self.k_start, 1, self.extents)

    def _by_forward(self, tokens: Tensor) -> Tensor:
        self.tables = []
        mask = self.mask
        if mask is not None:
            new = self.cache.get_seq_length() + 1 - mask.shape[1]
            mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
        model = self.model
        return model(
            tokens, attention_mask=mask, position_ids=self.last + self.passed, cache=self.cache
        ).logits
