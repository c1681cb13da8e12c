"""Objectives of logits: next-token cross-entropy, and distillation from a frozen parent's logits.

Both are means over tokens, in nats. Both go through the tokens in chunks and write the gradient of the logits
as they read them, so beside logits and gradient only one chunk of float32 is alive: with a vocabulary of 49k
the usual log-softmax would keep two more copies of everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # transformers' label of a token that is not to be predicted

# logits in a chunk: 32 MiB of float32, past the last-level cache (L3) and small beside a model
_CHUNK_VALUES = 1 << 23

# (logits of a chunk [n, V], its place) -> (loss of each token [n], its gradient [n, V])
_Rows = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of each next token, computed in float32.

    ``-1/n Σ_{b, t < T-1} log softmax(logits[b, t])[labels[b, t+1]]`` over the n labels that are not -100: the
    shift is made here, as transformers' causal language models make it.

    Args:
        logits: [B, T, V], floating.
        labels: [B, T] int64, usually the input tokens.

    Returns:
        A scalar, float32 (float64 for float64 logits).
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"cross_entropy: labels must have shape [B, T] of logits [B, T, V], "
            f"got {list(labels.shape)} and {list(logits.shape)}"
        )
    # The last position predicts nothing; marking it, instead of slicing the logits, copies nothing.
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    counted = target != IGNORED

    def rows(z: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        log_p = z.log_softmax(1)
        label, used = target[place].clamp_min(0)[:, None], counted[place]
        loss = torch.where(used, -log_p.gather(1, label)[:, 0], 0)
        gradient = log_p.exp_().scatter_add_(1, label, log_p.new_full(label.shape, -1))  # p - onehot
        return loss, gradient.mul_(used[:, None])

    return _ChunkedMean.apply(logits.flatten(0, 1), rows, counted.sum())


def distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL divergence of the student from the teacher, mean over tokens, computed in float32.

    ``τ²/n Σ_tokens Σ_v p_v (log p_v - log q_v)``, ``p = softmax(teacher/τ)``, ``q = softmax(student/τ)``.

    The factor τ² keeps the gradient's size when τ changes (Hinton, Vinyals and Dean, *Distilling the
    Knowledge in a Neural Network*, 2015, section 2). Forward KL at τ = 1 is what Minitron (Muralidharan et
    al., 2024) and the elastic models after it settled on. No gradient reaches the teacher.

    Args:
        student_logits: [..., V], floating.
        teacher_logits: [..., V], same shape.
        temperature: τ > 0.

    Returns:
        A scalar, float32 (float64 for float64 logits).
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "distillation: teacher_logits must have the shape of student_logits "
            f"{list(student_logits.shape)}, got {list(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"distillation: temperature must be above 0, got {temperature}")
    teacher = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])

    def rows(z: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        log_p = (teacher[place].to(z.dtype) / temperature).log_softmax(1)
        log_q = (z / temperature).log_softmax(1)
        p = log_p.exp()
        loss = (p * (log_p - log_q)).sum(1) * temperature**2
        return loss, log_q.exp_().sub_(p).mul_(temperature)

    count = teacher.new_full((), len(teacher), dtype=torch.int64)  # filled on the device, where it is read
    return _ChunkedMean.apply(student_logits.reshape(-1, student_logits.shape[-1]), rows, count)


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
    for z in flat.split(max(1, _CHUNK_VALUES // flat.shape[-1])):
        log_p = (z.float() / temperature).log_softmax(1)
        values, indices = log_p.topk(k)
        rest = log_p.scatter_(1, indices, -torch.inf).logsumexp(1)
        parts.append((values, indices.to(torch.int32), rest))
    values, indices, rest = (torch.cat(part) for part in zip(*parts, strict=True))
    shape = logits.shape[:-1]
    return TopLogits(values.view(*shape, k), indices.view(*shape, k), rest.view(shape))


def distillation_from_top(student_logits: Tensor, teacher: TopLogits, temperature: float = 1.0) -> Tensor:
    """`distillation` from `top_logits`: forward KL of the k most probable tokens and of one more, all the others.

    ``τ²/n Σ_tokens (Σ_{v in top} p_v (log p_v - log q_v) + p_r (log p_r - log q_r))``, where p_r and q_r are what
    teacher and student give to all other tokens together. The top alone would teach the student too sharp a
    distribution (Anshumann et al., *Sparse Logit Sampling*, arXiv 2503.16870). With the rest as one token the loss is
    a divergence again, and at most the whole one by the log sum inequality (Cover and Thomas, *Elements of Information
    Theory*, theorem 2.7.1): what differs is how the student shares out q_r. With k = V it is `distillation`.

    Args:
        student_logits: [..., V], floating.
        teacher: of these positions, at this temperature.
        temperature: τ > 0.

    Returns:
        A scalar, float32 (float64 for float64 logits).
    """
    if teacher.rest.shape != student_logits.shape[:-1]:
        raise ValueError(
            "distillation_from_top: teacher must be of the positions of student_logits "
            f"{list(student_logits.shape[:-1])}, got {list(teacher.rest.shape)}"
        )
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

    count = values.new_full((), len(values), dtype=torch.int64)
    return _ChunkedMean.apply(student_logits.flatten(0, -2), rows, count)


class _ChunkedMean(torch.autograd.Function):
    """``1/count Σ_n rows(logits)[n]``: loss and gradient in one pass over chunks of the tokens."""

    @staticmethod
    def forward(ctx, logits: Tensor, rows: _Rows, count: Tensor) -> Tensor:
        N, V = logits.shape
        dtype = torch.promote_types(logits.dtype, torch.float32)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        total = torch.zeros((), dtype=dtype, device=logits.device)
        step = max(1, _CHUNK_VALUES // max(V, 1))
        for start in range(0, N, step):
            place = slice(start, start + step)
            loss, dlogits = rows(logits[place].to(dtype), place)
            total += loss.sum()
            if gradient is not None:
                gradient[place] = dlogits.div_(count)
        if wanted:
            ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * dloss.to(gradient.dtype), None, None
