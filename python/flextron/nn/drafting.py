"""Drafting: a smaller sub-network proposes tokens, and one step of the chosen one says which of them are its own.

Both read one key/value cache, since a sub-network's groups are the first of each layer; what the draft stores there
the verifying step writes over. Greedy tokens are those of generation without a draft, sampled ones have the same
distribution (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

The sequences of a batch accept different numbers of tokens. The cache goes on by the fewest; what another sequence has
beyond these is given to the next step, which verifies and proposes less for it. So no token that was accepted is lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import astuple, dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from flextron.config import AXES
from flextron.nn.cache import ElasticCache
from flextron.nn.decode_step import VARYING_ROPE
from flextron.nn.generation import Asked, Output, is_understood
from flextron.nn.protocol import Elastic
from flextron.nn.rotary import rotary_of
from flextron.nn.setting import Setting
from flextron.nn.steps import Steps

MOST = 8  # tokens that are drafted at once
# What is believed of a draft before it was tried, and how much this weighs, in tokens. Of what was seen the half is
# forgotten in `_MEMORY` rounds, so that a draft that had stopped is tried again.
_BELIEVED, _WEIGHT, _MEMORY = 0.8, 4.0, 24
_DOT_ROWS = 8  # up to which rows of plain weights are dot products, see csrc/kernels/elastic_gemm.h
_COMPARED = 32  # of so many rounds one drafts nothing, and tells what that takes
# They remember earlier calls, or call the model themselves.
_STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


class Costs(NamedTuple):
    """What steps take, as a share of one token's step without a draft.

    Attributes:
        draft: a token's step of the draft.
        several: steps that verify 1, 2, .. tokens of each sequence.
    """

    draft: float
    several: tuple[float, ...] = (1.0,) * (MOST + 1)  # as if the weights that are read were all


@dataclass(frozen=True)
class Drafting:
    """How a generation drafts.

    Attributes:
        setting: the draft's.
        tokens: drafted at once, at most; None: as many as pay, by the costs and by how many were accepted so far.
        costs: what steps of so many sequences take.
    """

    setting: Setting
    tokens: int | None
    costs: Callable[[int], Costs]


@dataclass
class Drafted:
    """What a generation's drafts came to: an attribute ``drafted`` of what ``return_dict_in_generate`` returns.

    Attributes:
        rounds: steps of the verifying network after the prompt's.
        proposed: tokens that the draft proposed, up to the first of each round that was refused, that one included.
        accepted: those of them that were accepted.
    """

    rounds: int = 0
    proposed: int = 0
    accepted: int = 0

    def __add__(self, other: Drafted) -> Drafted:
        return Drafted(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def acceptance(self) -> float:
        """The share of proposed tokens that were accepted; NaN where none was proposed."""
        return self.accepted / self.proposed if self.proposed else float("nan")


_drafting: ContextVar[Drafting | None] = ContextVar("flextron.drafting", default=None)


@contextlib.contextmanager
def drafts_by(drafting: Drafting | None) -> Iterator[None]:
    """The length of a generation: transformers' code between our `generate` and our loop passes nothing on."""
    token = _drafting.set(drafting)
    try:
        yield
    finally:
        _drafting.reset(token)


def drafting_now() -> Drafting | None:
    """How the generation that is running drafts; None where it does not."""
    return _drafting.get()


def fault_of_draft(draft: Setting, chosen: Setting) -> str | None:
    """Why the network of a setting cannot draft for that of another, or None."""
    for setting in (draft, chosen):
        if setting.policy is not None:
            kind = "an adaptive one" if setting.dial.targets else "one for each request"
            return f"must be one static budget and draft for one, got {kind}"
    for axis in AXES:
        pairs = zip(getattr(draft.widths, axis), getattr(chosen.widths, axis), strict=True)
        for layer, (own, most) in enumerate(pairs):
            if own > most:
                return f"must be within the budget that it drafts for, got {axis} {own} for {most} in layer {layer}"
    return None


def fault_of_prompt(
    model: Elastic, input_ids: Tensor, config: GenerationConfig, inputs: dict[str, Any], synced: bool
) -> str | None:
    """What a generation must have been given to draft, and what it got; None where it can."""
    cache, rope = inputs.get("cache"), getattr(rotary_of(model, model.anatomy), "rope_type", None)
    if type(cache) is not ElasticCache:
        return f"an ElasticCache, got {type(cache).__name__}"
    if length := cache.get_seq_length():
        return f"an empty cache, got one of {length} tokens"
    if rope in VARYING_ROPE:  # of a block of tokens, all would get the tables of the last
        return f"rotary tables that do not depend on the length, got rope_type {rope!r}"
    if synced or not is_understood(model, input_ids, config, inputs):
        return "a prompt of tokens, their mask and a model as its class is, got other arguments or methods"
    return None


class Length:
    """How many tokens to draft next: as many as bring the most tokens for the time.

    With an acceptance of a for each token, k drafted tokens of one sequence bring 1 + a + .. + a^k tokens. Of B
    sequences all wait for the slowest, but keep what they are ahead: then a^sqrt(B) in the place of a is within 15 %
    of a simulation of 2, 4 and 8 sequences for k up to 3, and too low beyond.

    The time is that of the costs, each corrected by what such rounds took. In sampling it is not, since what is drawn
    depends on the lengths, and a seed must give the same tokens again.
    """

    def __init__(self, drafting: Drafting, B: int, is_timed: bool) -> None:
        self.fixed, costs, self.root = drafting.tokens, drafting.costs(B), B**0.5
        self.costs = [several + k * costs.draft for k, several in enumerate(costs.several)]
        self.is_timed = is_timed
        self.proposed = self.accepted = 0.0
        self.rounds = 0
        self.rates: dict[int, float] = {}  # seconds of rounds of k tokens, over their costs

    @property
    def acceptance(self) -> float:
        """What is believed of the next token."""
        return (self.accepted + _WEIGHT * _BELIEVED) / (self.proposed + _WEIGHT)

    def next(self, room: int) -> int:
        """The number of tokens to draft where at most ``room`` may follow; 0: none pays."""
        if self.fixed is not None:
            return min(self.fixed, room - 1)
        if self.is_timed and self.rounds % _COMPARED == 1:
            return 0  # what a draft must beat
        a, tokens, best, most = self.acceptance**self.root, 0.0, 0, 0.0
        usual = sum(self.rates.values()) / len(self.rates) if self.rates else 1.0
        for k in range(min(len(self.costs), room)):
            tokens += a**k
            gain = tokens / (self.costs[k] * self.rates.get(k, usual))
            if gain > most:
                best, most = k, gain
        return best

    def saw(self, k: int, proposed: int, accepted: int, seconds: float) -> None:
        """Take note of a round that drafted k tokens of each sequence."""
        kept = 0.5 ** (1 / _MEMORY)
        self.proposed = kept * self.proposed + proposed
        self.accepted = kept * self.accepted + accepted
        self.rounds += 1
        if self.is_timed and k < len(self.costs):
            rate = seconds / self.costs[k]
            # a round that another program held up says nothing, so that a low one weighs more
            before = self.rates.get(k, rate)
            self.rates[k] = before + (0.5 if rate < before else 0.1) * (rate - before)


class Networks(Steps):
    """The draft and the network that verifies it, in one cache."""

    def __init__(self, model: Elastic, prompt: Tensor, inputs: dict[str, Any], drafting: Drafting) -> None:
        super().__init__(model, prompt, inputs)
        self.drafting = drafting
        self.view: ElasticCache | None = None  # of the draft
        self.room: Sequence[Tensor] = ()
        self.judged: tuple[Setting | None, bool] = None, False
        self.window: tuple[Tensor, ...] = ()  # tables of the positions from the token `window_at` on
        self.window_at = 0

    def can_draft(self, B: int) -> bool:
        """Whether the draft lies within what the model is set to now, which a criterion may have changed."""
        self._is_served(B)
        setting = self.setting
        assert setting is not None
        if self.judged[0] is not setting:
            self.judged = setting, fault_of_draft(self.drafting.setting, setting) is None
        return self.judged[1]

    def alike(self, B: int) -> int:
        """How many tokens of B sequences the decoder op takes at once with the bits of one after another."""
        is_plain = self.extents is not None and self.step.format == "plain"
        return _DOT_ROWS // B if is_plain and B <= _DOT_ROWS else MOST + 1

    def begin(self, B: int, tokens: int) -> None:
        """Make room for so many tokens, and let the draft begin where the cache ends."""
        assert self.setting is not None
        cache, groups = self.cache, self.setting.kv_heads
        first = cache.layers[0].keys
        room, _ = cache.reserve(first, B, tokens, groups, first.shape[-1])
        if self.view is None or room is not self.room:
            self.room, self.view = room, cache.first_groups(self.drafting.setting.kv_heads)
        self.view.rewind(cache.get_seq_length())

    def draft(self, tokens: Tensor, column: int) -> tuple[Tensor, Tensor | None]:
        """The draft's logits [B, 1, V] after tokens [B, 1], and their arg-max [B] where that is known."""
        assert self.view is not None
        return self._logits(tokens, column, self.view, self.drafting.setting)

    def verify(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The chosen network's logits [B, T, V] after tokens [B, T], and the last ones' arg-max [B]."""
        assert self.setting is not None
        return self._logits(tokens, 0, self.cache, self.setting)

    def _logits(
        self, tokens: Tensor, column: int, cache: ElasticCache, setting: Setting
    ) -> tuple[Tensor, Tensor | None]:
        B, T = tokens.shape
        if self._is_served(B):
            extents = setting.extents(B)
            assert extents is not None
            return self.step(self.model, tokens, *self._tables(column, T), cache, self.k_start, T, extents)
        with self.model.settings.block(setting):
            positions = (
                self.last + self.passed + 1 + torch.arange(column, column + T, device=self.last.device)
            )
            return self._by_modules(tokens, positions, cache), None

    def _tables(self, column: int, T: int) -> tuple[Tensor, Tensor]:
        """The rotary tables of T tokens from a column of the block on."""
        at = self.passed + 1 + column - self.window_at
        if not self.window or at + T > len(self.ahead_of):
            self.window_at, at = self.passed + 1, column
            self.window = self.step.tables(self.step.norm, self.last + self.window_at + self.ahead_of)
        cos, sin = (table[:, at : at + T] for table in self.window)
        return cos, sin

    def take(self, verified: int, taken: int) -> None:
        """Count so many of the tokens that were verified; the cache forgets the others."""
        self.cache.rewind(self.cache.get_seq_length() - verified + taken)
        self.passed += taken


def drafted(model: Elastic, asked: Asked, drafting: Drafting) -> Tensor | GenerateDecoderOnlyOutput:
    """Continue the sequences as `flextron.nn.generation.sample` does, by fewer steps of the chosen network."""
    if foreign := next((each for each in asked.logits_processor if isinstance(each, _STATEFUL)), None):
        raise NotImplementedError(
            "generate: draft_budget must be given with processors of logits that depend on the tokens alone, "
            f"got {type(foreign).__name__}"
        )
    logits = model(input_ids=asked.input_ids, **asked.inputs).logits
    networks = Networks(model, asked.input_ids, asked.inputs, drafting)
    output = Output(asked)
    try:
        counts = _continued(networks, logits, output)
    finally:
        networks.end()
    result = output.result(networks.cache)
    if isinstance(result, GenerateDecoderOnlyOutput):
        result.drafted = counts
    return result


def _continued(networks: Networks, logits: Tensor, output: Output) -> Drafted:
    """The loop, from the prompt's logits [B, .., V] on."""
    B, counts = len(output.ids), Drafted()
    length = Length(networks.drafting, B, not output.config.do_sample)
    tokens = _drawn(output.ranked(logits[:, -1]), output.config.do_sample)[0]
    is_done = output.put(tokens)
    known: list[list[int]] = [[] for _ in range(B)]  # of each sequence, what is known beyond the others
    while not is_done:
        began = perf_counter()
        k = length.next(min(output.room, networks.alike(B))) if networks.can_draft(B) else 0
        networks.begin(B, k + 1)
        ended = output.ended()
        known = [[output.pad] * (k + 1) if end else row for end, row in zip(ended, known, strict=True)]
        step = _Round(output, known, k)
        step.propose(networks)
        step.verify(networks)
        proposed, accepted = step.counted(ended)
        counts += Drafted(1, proposed, accepted)
        taken, is_done = step.commit(ended)
        networks.take(k + 1, taken)
        length.saw(k, proposed, accepted, perf_counter() - began)
        known = [row[taken:] for row in step.made]
    return counts


class _Round:
    """k tokens that are drafted for each sequence, and what the verifying step makes of them.

    Attributes:
        block: [B, k + 1], the last token of each sequence and the drafted ones, or those that were known instead.
        made: of each sequence the tokens that follow its last one.
    """

    def __init__(self, output: Output, known: list[list[int]], k: int) -> None:
        self.output, self.known, self.k = output, known, k
        self.block = output.ids[:, -1:]
        self.made = [list(row) for row in known]
        self.drawn: list[Tensor] = []  # the distribution [B, V] of each drafted token, in sampling
        self.scored: list[
            tuple[Tensor, Tensor]
        ] = []  # logits and scores [B, V] after each token of the block

    def propose(self, networks: Networks) -> None:
        output = self.output
        for column in range(self.k):
            logits, best = networks.draft(self.block[:, -1:], column)
            if best is None or not output.is_plain:
                ranked = output.processor(self._ids(column), logits[:, -1].float())
                tokens, p = _drawn(ranked, output.config.do_sample)
                if p is not None:
                    self.drawn.append(p)
            else:
                tokens = best[:, None]
            given = [row[column] if column < len(row) else -1 for row in self.known]
            if max(given) >= 0:
                forced = torch.tensor(given, device=tokens.device)[:, None]
                tokens = forced.where(forced >= 0, tokens)
            self.block = torch.cat([self.block, tokens], 1)

    def _ids(self, column: int) -> Tensor:
        """All tokens up to a column of the block, whose own is the last."""
        return torch.cat([self.output.ids, self.block[:, 1 : column + 1]], 1)

    def verify(self, networks: Networks) -> None:
        output, T = self.output, self.k + 1
        logits, best = networks.verify(self.block)
        block = self.block.tolist()
        plain: list[list[int]] = []
        if output.is_plain:
            plain = (logits.argmax(-1) if best is None or T > 1 else best[:, None]).tolist()
        going = list(range(len(block)))  # sequences whose tokens up to the column are right
        for column in range(T):
            if not going:
                break
            if not output.is_plain:
                last = logits[:, column].float()
                self.scored.append((last, output.processor(self._ids(column), last)))
            for b in going:
                if column >= len(self.made[b]):
                    own = plain[b][column] if plain else self._chosen(b, column, block[b])
                    self.made[b].append(own)
            going = [b for b in going if column < self.k and block[b][column + 1] == self.made[b][column]]

    def _chosen(self, b: int, column: int, block: list[int]) -> int:
        """The token of a sequence after a column of the block."""
        ranked = self.scored[column][1][b]
        if not self.output.config.do_sample:
            return int(ranked.argmax())
        p = ranked.softmax(-1)
        return accepted(p, self.drawn[column][b], block[column + 1]) if column < self.k else _one_of(p)

    def counted(self, ended: list[bool]) -> tuple[int, int]:
        """How many tokens were proposed up to the first that was refused, and how many of them were accepted."""
        block, proposed, right = self.block.tolist(), 0, 0
        for b, (known, made) in enumerate(zip(self.known, self.made, strict=True)):
            if ended[b]:
                continue
            for column in range(len(known), min(len(made), self.k)):
                proposed += 1
                right += block[b][column + 1] == made[column]
        return proposed, right

    def commit(self, ended: list[bool]) -> tuple[int, bool]:
        """Put what all sequences have into the output: how many tokens of each, and whether all is done.

        Up to the first end of a sequence: what follows it is padding, which the cache must hold too.
        """
        output, most = self.output, min(self.k + 1, *map(len, self.made))
        for column in range(most):
            if self.scored:
                output.keep(*self.scored[column])
            row = torch.tensor([made[column] for made in self.made], device=output.ids.device)
            if output.put(row[:, None]):
                return column + 1, True
            if output.ended() != ended:
                return column + 1, False
        return most, False


def _drawn(ranked: Tensor, samples: bool) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, 1] of scores [B, V], and in sampling the distribution [B, V] that they were drawn from."""
    if not samples:
        return ranked.argmax(-1, keepdim=True), None
    p = ranked.softmax(-1)
    return torch.multinomial(p, 1), p


def accepted(p: Tensor, q: Tensor, token: int) -> int:
    """A token with the distribution p [V], made of one that was drawn from the draft's, q [V].

    The token is kept with probability min(1, p / q); else one is drawn from what p has more than q.
    """
    if torch.rand((), device=p.device) * q[token] < p[token]:
        return token
    rest = (p - q).clamp_min(0)
    return _one_of(rest if rest.any() else p)  # none where they differ by rounding alone


def _one_of(p: Tensor) -> int:
    return int(torch.multinomial(p, 1))
