"""The loop of greedy and sampled generation: a token costs its decode step and little else.

transformers' own loop prepares and unpacks every forward anew, which takes a fifth of a short decode step on a CPU.
Logits processors, stopping criteria and streamers are transformers' here too. On a GPU the step is a captured graph,
and the host reads of a greedy token only whether it was the last, two tokens later.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from flextron.nn.cache import ElasticCache
from flextron.nn.deadline import Holding
from flextron.nn.forward import is_known, is_transformed, runs_on
from flextron.nn.graph import MOST_ENDS
from flextron.nn.protocol import Elastic
from flextron.nn.static_cache import StaticCache
from flextron.nn.steps import CapturedSteps, Steps

_NO_END = 1 << 62  # tokens
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


def is_plain(model: Elastic, input_ids: Tensor, config: GenerationConfig, inputs: dict[str, Any]) -> bool:
    """Whether `sample` returns what transformers' loop would return for a new prompt."""
    is_ours = runs_on(input_ids.device) or isinstance(inputs.get("cache"), StaticCache)
    return is_ours and is_understood(model, input_ids, config, inputs)


def is_understood(
    model: Elastic, input_ids: Tensor, config: GenerationConfig, inputs: dict[str, Any]
) -> bool:
    """Whether a loop of ours knows all that there is to a new prompt."""
    cache, mask, positions = (inputs.get(name) for name in ("cache", "attention_mask", "position_ids"))
    return (
        input_ids.device == model.device
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


class Asked(NamedTuple):
    """What transformers asks of a loop: to continue the sequences of input_ids [B, T] until the criteria end them all.

    Attributes:
        inputs: the arguments of the prompt's forward.
    """

    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: BaseStreamer | None
    inputs: dict[str, Any]


def sample(
    model: Elastic, asked: Asked, holding: Holding | None = None
) -> Tensor | GenerateDecoderOnlyOutput:
    """Continue the sequences, each token at the budget that the model is set to, or that holds a deadline."""
    ids, inputs = asked.input_ids, asked.inputs
    logits = model(input_ids=ids, **inputs).logits
    if holding is not None:
        holding.prompt()
    kind = CapturedSteps if isinstance(inputs["cache"], StaticCache) else Steps
    steps = kind(model, ids, inputs, holding)
    output = Output(asked)
    try:
        return _continued(steps, logits, output, asked.config, inputs["cache"])
    finally:
        steps.end()


def _continued(
    steps: Steps,
    logits: Tensor,
    output: Output,
    config: GenerationConfig,
    cache: ElasticCache,
) -> Tensor | GenerateDecoderOnlyOutput:
    """The loop, from the prompt's logits [B, .., V] on."""
    best = None
    ending = output.ending()
    while True:
        if best is None or not output.is_plain:
            ranked = output.ranked(logits[:, -1])
            drawn = config.do_sample
            tokens = torch.multinomial(ranked.softmax(-1), 1) if drawn else ranked.argmax(-1, keepdim=True)
        else:
            tokens = best[:, None]
        is_done = output.put(tokens)
        if ending is not None and not is_done:
            most = output.room
            more, output.unfinished, is_done = steps.ahead(
                output.ids[:, -1:], most, output.unfinished, ending, config
            )
            output.ids = torch.cat([output.ids, more], 1)
            is_done = is_done or more.shape[1] == most
        if is_done:
            break
        logits, best = steps(output.ids[:, -1:])
    return output.result(cache)


class Output:
    """What a generation has made of the sequences so far, and what ends them.

    Attributes:
        ids: [B, T], the prompt and the tokens after it.
        unfinished: [B, 1] bool: sequences that nothing has ended; the others get padding.
        is_plain: whether the next token is where the model's own logits are greatest, and nobody asks for these.
    """

    def __init__(self, asked: Asked) -> None:
        config = asked.config
        self.ids, self.config, self.streamer = asked.input_ids, config, asked.streamer
        self.processor = asked.logits_processor
        self.lengths, self.others = _split(asked.stopping_criteria)
        self.ends = any(hasattr(criterion, "eos_token_id") for criterion in self.others)
        self.unfinished = torch.ones(len(self.ids), 1, dtype=torch.bool, device=self.ids.device)
        is_whole = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if is_whole and config.output_scores else None
        self.raw: tuple[Tensor, ...] | None = () if is_whole and config.output_logits else None
        is_watched = self.scores is not None or self.raw is not None
        self.is_plain = not (config.do_sample or asked.logits_processor or is_watched)

    @property
    def room(self) -> int:
        """How many tokens may follow."""
        return min((length.max_length for length in self.lengths), default=_NO_END) - self.ids.shape[1]

    @property
    def pad(self) -> int:
        """What follows the end of a sequence."""
        return int(self.config._pad_token_tensor)

    def ended(self) -> list[bool]:
        """Which sequences get padding from now on."""
        return [self.ends and not going for (going,) in self.unfinished.tolist()]

    def ending(self) -> list[Tensor] | None:
        """The tokens that end a sequence, where tokens may be made without a look at each; else None."""
        return _ending(self.others) if self.is_plain and self.lengths and self.streamer is None else None

    def ranked(self, logits: Tensor) -> Tensor:
        """The scores [B, V] that the next token is chosen by, of the model's logits [B, V]."""
        last = logits.float()
        ranked = self.processor(self.ids, last)
        self.keep(last, ranked)
        return ranked

    def keep(self, last: Tensor, ranked: Tensor) -> None:
        """Keep the logits and scores [B, V] of a token, where they are asked for."""
        if self.scores is not None:
            self.scores += (ranked,)
        if self.raw is not None:
            self.raw += (last,)

    def put(self, tokens: Tensor) -> bool:
        """Append tokens [B, 1]; whether all sequences have ended."""
        if self.ends:
            tokens = tokens.where(self.unfinished, self.config._pad_token_tensor)
        self.ids = torch.cat([self.ids, tokens], 1)
        is_done = any(self.ids.shape[1] >= length.max_length for length in self.lengths)
        if self.others:
            self.unfinished = self.unfinished & ~self.others(self.ids, self.scores)[:, None]
            is_done = is_done or not self.unfinished.any()
        if self.streamer is not None:
            self.streamer.put(tokens[:, 0])
        return is_done

    def result(self, cache: ElasticCache) -> Tensor | GenerateDecoderOnlyOutput:
        """What `generate` returns, once all is made."""
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        return GenerateDecoderOnlyOutput(sequences=self.ids, scores=self.scores, logits=self.raw, cache=cache)


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


def _ending(criteria: StoppingCriteriaList) -> list[Tensor] | None:
    """The tokens that end a sequence, where nothing else does; None where something else may."""
    if any(type(criterion) is not EosTokenCriteria for criterion in criteria):
        return None
    ends = [criterion.eos_token_id for criterion in criteria]
    return ends if sum(map(Tensor.numel, ends)) <= MOST_ENDS else None
