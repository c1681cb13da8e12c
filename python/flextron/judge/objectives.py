"""Objectives of logits: next-token cross-entropy, and distillation from a frozen parent's logits.

All are means over tokens, in nats. All go through the tokens in chunks and write the gradient of the logits as they
read them, so that only one chunk of float32 is alive. With a head, `weighted` makes the logits too, some rows at a
time, and turns them into their gradient where they lie: logits of all tokens are never there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORED = -100  # transformers' label of a token that is not to be predicted

# Logits in a chunk of float32. On a GPU 32 MiB, so that launches are few; on a CPU half a MiB, so that the chunk and
# what is made of it stay in a core's L2 cache.
_CHUNK_VALUES = 1 << 23
_CHUNK_VALUES_CPU = 1 << 17
# Logits that a head makes at once, as they are computed (64 MiB of bfloat16): enough rows for its three GEMMs.
_HEAD_VALUES = 1 << 25
# Rows of a head's gradient that are made at once: what a CPU's caches hold before it is widened to float32.
_HEAD_ROWS = 4096

# (logits of a chunk [n, V], its place) -> (loss of each token [n], its gradient [n, V])
_Rows = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Objective:
    """A mean over tokens, by chunks of the logits: what the functions below are made of.

    Attributes:
        rows: (logits of a chunk [n, V] in float32, its place among the tokens) -> the loss of each token [n] and its
            gradient [n, V], of which it keeps neither.
        count: how many tokens count, [] int64.
    """

    rows: _Rows
    count: Tensor


def weighted(
    x: Tensor, head: nn.Linear | None, terms: Sequence[tuple[float, Objective]]
) -> tuple[Tensor, list[Tensor]]:
    """``sum_i w_i term_i`` of logits, and each term, which has no gradient.

    Args:
        x: [..., V] logits; with a head [..., K], what it makes them of.
        head: a plain linear layer, whose weight and bias get their gradients; under autocast it computes in its dtype.
        terms: (w_i, term_i), one at least.

    Returns:
        Scalars, float32 (float64 for float64 logits).
    """
    weight, bias = (None, None) if head is None else (head.weight, head.bias)
    total, values = _Weighted.apply(x.reshape(-1, x.shape[-1]), weight, bias, tuple(terms))
    return total, list(values.unbind())


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of each next token, computed in float32; `next_token` of logits [B, T, V].

    Returns:
        A scalar, float32 (float64 for float64 logits).
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"cross_entropy: labels must have shape [B, T] of logits [B, T, V], "
            f"got {list(labels.shape)} and {list(logits.shape)}"
        )
    return weighted(logits, None, [(1.0, next_token(labels))])[0]


def next_token(labels: Tensor) -> Objective:
    """Cross-entropy of each next token.

    ``-1/n Σ_{b, t < T-1} log softmax(logits[b, t])[labels[b, t+1]]`` over the n labels that are not -100: the
    shift is made here, as transformers' causal language models make it.

    Args:
        labels: [B, T] int64, usually the input tokens.
    """
    # The last position predicts nothing; marking it, instead of slicing the logits, copies nothing.
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    counted = target != IGNORED

    def rows(z: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        label, used = target[place].clamp_min(0)[:, None], counted[place]
        p, log_sum = _softmax(z)
        loss = torch.where(used, log_sum - z.gather(1, label)[:, 0], 0)
        gradient = p.scatter_add_(1, label, p.new_full(label.shape, -1))  # p - onehot
        return loss, gradient.mul_(used[:, None])

    return Objective(rows, counted.sum())


def distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL divergence of the student from the teacher, mean over tokens; `imitation` of logits [..., V].

    Returns:
        A scalar, float32 (float64 for float64 logits).
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "distillation: teacher_logits must have the shape of student_logits "
            f"{list(student_logits.shape)}, got {list(teacher_logits.shape)}"
        )
    return weighted(student_logits, None, [(1.0, imitation(teacher_logits, temperature))])[0]


def imitation(teacher_logits: Tensor, temperature: float = 1.0) -> Objective:
    """Forward KL divergence of the student from the teacher, computed in float32.

    ``τ²/n Σ_tokens Σ_v p_v (log p_v - log q_v)``, ``p = softmax(teacher/τ)``, ``q = softmax(student/τ)``.

    The factor τ² keeps the gradient's size when τ changes (Hinton, Vinyals and Dean, *Distilling the
    Knowledge in a Neural Network*, 2015, section 2). Forward KL at τ = 1 is what Minitron (Muralidharan et
    al., 2024) and the elastic models after it settled on. No gradient reaches the teacher.

    Args:
        teacher_logits: [..., V], of the student's tokens.
        temperature: τ > 0.
    """
    if not temperature > 0:
        raise ValueError(f"distillation: temperature must be above 0, got {temperature}")
    teacher = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])

    def rows(z: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        t = teacher[place].to(z.dtype)
        if temperature != 1:
            t, z = t / temperature, z / temperature
        (p, t_sum), (q, z_sum) = _softmax(t), _softmax(z)
        # log p_v - log q_v is t_v - z_v but for what is the same for all v
        loss = torch.linalg.vecdot(p, t - z) - (t_sum - z_sum)
        gradient = q.sub_(p)
        return loss * temperature**2, gradient if temperature == 1 else gradient.mul_(temperature)

    # filled on the device, where it is read
    return Objective(rows, teacher.new_full((), len(teacher), dtype=torch.int64))


class TopLogits(NamedTuple):
    """A teacher's prediction, shortened: its most probable tokens, and all others as one.

    Attributes:
        values: [..., k] log p of the most probable tokens, float32.
        indices: [..., k] these tokens, int32.
        rest: [...] log of the share of all others; -inf where there are none.
    """

    values: Tensor
    indices: Tensor
    rest: Tensor


def top_logits(logits: Tensor, k: int, temperature: float = 1.0) -> TopLogits:
    """The k most probable tokens of ``softmax(logits/τ)``, computed in float32; logits [..., V]."""
    flat = logits.detach().flatten(0, -2)
    parts = []
    for z in flat.split(_chunk_rows(flat)):
        log_p = (z.float() / temperature).log_softmax(1)
        values, indices = log_p.topk(k)
        rest = log_p.scatter_(1, indices, -torch.inf).logsumexp(1)
        parts.append((values, indices.to(torch.int32), rest))
    values, indices, rest = (torch.cat(part) for part in zip(*parts, strict=True))
    shape = logits.shape[:-1]
    return TopLogits(values.view(*shape, k), indices.view(*shape, k), rest.view(shape))


def distillation_from_top(student_logits: Tensor, teacher: TopLogits, temperature: float = 1.0) -> Tensor:
    """`imitation_of_top` of logits [..., V].

    Returns:
        A scalar, float32 (float64 for float64 logits).
    """
    if teacher.rest.shape != student_logits.shape[:-1]:
        raise ValueError(
            "distillation_from_top: teacher must be of the positions of student_logits "
            f"{list(student_logits.shape[:-1])}, got {list(teacher.rest.shape)}"
        )
    return weighted(student_logits, None, [(1.0, imitation_of_top(teacher, temperature))])[0]


def imitation_of_top(teacher: TopLogits, temperature: float = 1.0) -> Objective:
    """`imitation` from `top_logits`: forward KL of the k most probable tokens and of one more, all the others.

    ``τ²/n Σ_tokens (Σ_{v in top} p_v (log p_v - log q_v) + p_r (log p_r - log q_r))``, where p_r and q_r are what
    teacher and student give to all other tokens together. The top alone would teach the student too sharp a
    distribution (Anshumann et al., *Sparse Logit Sampling*, arXiv 2503.16870). With the rest as one token the loss is
    a divergence again, and at most the whole one by the log sum inequality (Cover and Thomas, *Elements of Information
    Theory*, theorem 2.7.1): what differs is how the student shares out q_r. With k = V it is `distillation`.

    Args:
        teacher: of the student's tokens, at this temperature.
        temperature: τ > 0.
    """
    values, indices = teacher.values.flatten(0, -2), teacher.indices.flatten(0, -2)
    rest = teacher.rest.flatten()

    def rows(z: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        log_p, top, log_rest = values[place].to(z.dtype), indices[place].long(), rest[place].to(z.dtype)
        log_q = (z / temperature).log_softmax(1)
        log_q_top = log_q.gather(1, top)
        others = log_q.scatter_(1, top, -torch.inf)
        log_q_rest = others.logsumexp(1)
        p, p_rest = log_p.exp(), log_rest.exp()
        further = torch.where(p_rest > 0, log_rest - log_q_rest, 0)
        loss = ((p * (log_p - log_q_top)).sum(1) + p_rest * further) * temperature**2
        # q_v - p_v in the top; what is beyond it has its share of q_r - p_r
        beyond = others.sub_(log_q_rest[:, None]).exp_().mul_((log_q_rest.exp() - p_rest)[:, None])
        return loss, beyond.scatter_(1, top, log_q_top.exp() - p).mul_(temperature)

    return Objective(rows, values.new_full((), len(values), dtype=torch.int64))


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """softmax of rows [n, V], and log sum exp of each [n], which the largest share tells: one exponential each."""
    p = z.softmax(1)
    return p, z.amax(1) - p.amax(1).log()


def _chunk_rows(logits: Tensor) -> int:
    """Tokens of a chunk of float32."""
    values = min(_CHUNK_VALUES, _CHUNK_VALUES_CPU) if logits.device.type == "cpu" else _CHUNK_VALUES
    return max(1, values // max(logits.shape[-1], 1))


def _is_one(scale: Tensor) -> bool:
    """Whether a gradient need not be scaled; a GPU is not asked, for the host would wait for it."""
    return scale.device.type == "cpu" and bool(scale == 1)


class _Weighted(torch.autograd.Function):
    """Loss and gradient of weighted objectives in one pass over chunks of the tokens: see `weighted`."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        terms: tuple[tuple[float, Objective], ...],
    ) -> tuple[Tensor, Tensor]:
        device, wanted = x.device.type, ctx.needs_input_grad[:3]
        casts = weight is not None and torch.is_autocast_enabled(device)
        computed = torch.get_autocast_dtype(device) if casts else x.dtype
        walk = _Walk(terms, torch.promote_types(computed, torch.float32), x.device)
        with torch.autocast(device, enabled=False):
            if weight is None:
                found = [torch.empty_like(x) if wanted[0] else None, None, None]
                walk(x, found[0], 0)
            else:
                found = _through_head(x, weight, bias, walk, computed, wanted)
        ctx.save_for_backward(*found)
        means = walk.means()
        ctx.mark_non_differentiable(means)
        return (means * walk.weights).sum(), means

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if not _is_one(dtotal):
            gradients = [None if g is None else g * dtotal.to(g.dtype) for g in gradients]
        return (*gradients, None)


class _Walk:
    """Goes through logits chunk by chunk: adds up each term, and writes the gradient of their weighted means."""

    def __init__(
        self, terms: tuple[tuple[float, Objective], ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = [term.rows for _, term in terms]
        self.counts = torch.stack([term.count for _, term in terms]).to(dtype)
        self.weights = torch.tensor([weight for weight, _ in terms], dtype=dtype, device=device)
        self.scales = (self.weights / self.counts).unbind()
        self.sums = torch.zeros_like(self.weights)

    def means(self) -> Tensor:
        return self.sums / self.counts

    def __call__(self, logits: Tensor, gradient: Tensor | None, begin: int) -> None:
        """Logits [n, V] are those of the tokens from ``begin`` on; ``gradient`` may be ``logits`` themselves."""
        step = _chunk_rows(logits)
        for start in range(0, len(logits), step):
            some = logits[start : start + step]
            z, place = some.to(self.sums.dtype), slice(begin + start, begin + start + len(some))
            whole: Tensor | None = None
            for i, (rows, scale) in enumerate(zip(self.rows, self.scales, strict=True)):
                loss, part = rows(z, place)
                self.sums[i] += loss.sum()
                if gradient is not None:
                    part.mul_(scale)
                    whole = part if whole is None else whole.add_(part)
            if gradient is not None and whole is not None:
                gradient[start : start + step] = whole


def _through_head(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    walk: _Walk,
    computed: torch.dtype,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x [N, K], weight [V, K] and bias [V], those that are wanted."""
    rows, w = x.to(computed), weight.to(computed)
    b = None if bias is None else bias.to(computed)
    found = [
        torch.empty_like(t) if t is not None and is_wanted else None
        for t, is_wanted in zip((x, weight, bias), wanted, strict=True)
    ]
    dx, dw, db = found
    step = max(1, _HEAD_VALUES // len(w))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        logits = F.linear(some, w, b)
        walk(logits, logits if any(wanted) else None, start)
        if dx is not None:
            dx[start : start + step] = logits @ w
        if dw is not None:
            for to, part in zip(dw.split(_HEAD_ROWS), logits.split(_HEAD_ROWS, dim=1), strict=True):
                _accumulate(to, part.mT @ some, start)
        if db is not None:
            _accumulate(db, logits.sum(0), start)
    return found


def _accumulate(total: Tensor, part: Tensor, start: int) -> None:
    if start == 0:
        total.copy_(part)
    else:
        total.add_(part)
