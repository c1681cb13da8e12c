"""Round weights to the four bits of int4 panels: of each group of inputs of a row a range of 16 values, and codes.

A value is ``least + scale * code``, both numbers float16, the scale of either sign. A group that lies on such a grid
already, as weights do that come from a GGUF file of the types Q4_0, Q4_1 or Q4_K, gets this very grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .panels import GROUP

_MOST = torch.finfo(torch.float16).max
_AT_ONCE = 4096  # groups whose temporaries stay in the caches
_STEPS = (13.5, 14.2, 14.9, 15.6, 16.3, 17.0)  # of a range, from the least value to the greatest of a group
# Of the mean square of an input, added to it: some thousands of tokens say little of what the inputs beside it are.
# With 0.01, 4096 tokens make 1536 inputs miss up to 1.5 times as much on other text (SmolLM2's last projections).
_DAMPING = 1.0


def rounded(weight: Tensor, in_blocks: int, products: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [N, K] uint8 and (scale, least) [N, groups of all blocks, 2] float16 of a weight [N, K].

    Args:
        weight: float32, bfloat16 or float16, of a size up to 65504.
        in_blocks: blocks of inputs, each of which begins a group.
        products: None: each group has the range with the least square error. [K, K], sums of x^T x over inputs x: what
            is missed at an input is made up for by the inputs behind it, except in rows that lie on grids.
    """
    N, K = weight.shape
    inputs = K // in_blocks
    groups = _filled(weight.float().view(N, in_blocks, inputs)).unflatten(2, (-1, GROUP))
    count, eps = groups.shape[1] * groups.shape[2], torch.finfo(weight.dtype).eps
    parts = []
    for some in groups.flatten(0, 2).split(_AT_ONCE):
        ranges, found = _on_grid(some, eps)
        if products is None and not found.all():
            ranges[~found] = _searched(some[~found])
        parts.append((_codes(some, ranges), ranges, found))
    codes, ranges, found = (torch.cat(each) for each in zip(*parts, strict=True))
    codes = codes.view(N, in_blocks, -(-inputs // GROUP) * GROUP)[..., :inputs].flatten(1).to(torch.uint8)
    ranges, found = ranges.view(N, count, 2), found.view(N, count)
    if products is not None:
        rest = ~found.all(1)
        known = ranges[rest].where(found[rest][..., None], torch.nan)
        codes[rest], ranges[rest] = _with_feedback(weight[rest].float(), in_blocks, products, known)
    return codes, ranges.half()


def _filled(groups: Tensor) -> Tensor:
    """The last dimension filled up to whole groups by its last value, which does not widen a group's range."""
    rest = groups[..., -1:].expand(*groups.shape[:-1], -groups.shape[-1] % GROUP)
    return torch.cat((groups, rest), -1)


def _codes(groups: Tensor, ranges: Tensor) -> Tensor:
    """The nearest codes of groups [n, GROUP] in ranges [n, 2], float32."""
    scale, least = ranges.split(1, 1)
    return ((groups - least) / scale.where(scale != 0, 1)).round().clamp(0, 15)


def _error(groups: Tensor, codes: Tensor, ranges: Tensor) -> Tensor:
    """The squares of what codes in ranges miss, [n, GROUP]."""
    scale, least = ranges.split(1, 1)
    return (codes * scale + least - groups).square()


def _half(x: Tensor) -> Tensor:
    return x.clamp(-_MOST, _MOST).half().float()


def _on_grid(groups: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(scale, least) [n, 2] float32 of groups [n, GROUP] float32, and which of them lie there, to rounding by eps."""
    low, high = groups.aminmax(dim=1, keepdim=True)
    size = torch.maximum(high, -low)
    ranges = torch.cat((torch.zeros_like(low), _half(low)), 1)
    missed = torch.where(low == high, (low - ranges[:, 1:]).abs(), torch.inf)[:, 0]
    found = missed == 0
    for span in range(15, 0, -1):  # the greatest code, if the least is 0
        scale = (high - low) / span
        near = 1.25 * eps * size / scale + 1e-5  # of steps: how far rounding moves a value from its place
        few = (groups[:, :8] - low) / scale
        maybe = ((few - few.round()).abs() <= near).all(1) & (near < 0.25)[:, 0]
        (at,) = (maybe & (missed > 0)).nonzero(as_tuple=True)
        if not len(at):
            continue
        these, codes = groups[at], (groups[at] - low[at]) / scale[at]
        there = ((codes - codes.round()).abs() <= near[at]).all(1)
        at, these, codes = at[there], these[there], codes[there].round()
        ours = _of_codes(these, codes, span)
        error = _error(these, _codes(these, ours), ours).sum(1)
        better = error < missed[at]
        ranges[at[better]], missed[at[better]], found[at] = ours[better], error[better], True
    return ranges, found


def _of_codes(groups: Tensor, codes: Tensor, span: int) -> Tensor:
    """The (scale, least) [n, 2] of groups of which it is known how many steps above its least a value is."""
    apart, middle = groups - groups.amin(1, keepdim=True), codes - codes.mean(1, keepdim=True)
    scale = _half((middle * apart).sum(1, keepdim=True) / middle.square().sum(1, keepdim=True))
    start = (groups - codes * scale).mean(1, keepdim=True)
    best = torch.full_like(start, torch.inf)
    ranges = torch.cat((scale, _half(start)), 1)
    # Which least number a float16 holds: in Q4_0 that 8 steps below 0, or above it, by steps that go down.
    for step, end in ((scale, start), (-scale, start + span * scale)):
        for shift in range(16 - span):
            least = _half(end - shift * step)
            error = (least + shift * step - end).abs()
            better = error < best - 1e-5 * scale  # else the first
            best, ranges = error.where(better, best), torch.cat((step, least), 1).where(better, ranges)
    return ranges


def _searched(groups: Tensor, share: Tensor | None = None) -> Tensor:
    """The ranges [n, 2] of groups [n, GROUP] with the least square error, float32.

    From several widths of the range, each fitted twice to the codes that it gives.

    Args:
        share: [GROUP], what the square of an input's error counts; None: all the same.
    """
    share = groups.new_ones(GROUP) if share is None else share
    low, high = groups.aminmax(dim=1, keepdim=True)
    ranges, least_error = torch.cat((torch.zeros_like(low), _half(low)), 1), torch.full_like(low, torch.inf)
    total, mean = share.sum(), (groups * share).sum(1, keepdim=True) / share.sum()
    for steps in _STEPS:
        scale = (high - low) / steps
        tried = torch.cat((scale, (low + high) / 2 - 7.5 * scale), 1)
        for _ in range(2):
            codes = _codes(groups, tried)
            middle = (codes * share).sum(1, keepdim=True) / total
            apart = (codes - middle) * share
            square = (apart * codes).sum(1, keepdim=True)
            scale = _half((apart * groups).sum(1, keepdim=True) / square.where(square > 0, 1)).clamp(min=0)
            tried = torch.cat((scale, _half(mean - scale * middle)), 1)
        error = (_error(groups, _codes(groups, tried), tried) * share).sum(1, keepdim=True)
        ranges = tried.where(error < least_error, ranges)
        least_error = torch.minimum(error, least_error)
    return ranges


def _with_feedback(weight: Tensor, in_blocks: int, products: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """codes [N, K] uint8 and (scale, least) [N, groups of all blocks, 2] float32 of a weight [N, K] float32.

    GPTQ (Frantar et al., arXiv 2210.17323) in the order of the inputs.

    Args:
        known: (scale, least) of the groups that have them, NaN of the others.
    """
    N, K = weight.shape
    square = products.double()
    mean = square.diagonal().mean().item() if K else 0.0
    square = square + torch.diag(_DAMPING * square.diagonal() + (0.01 * mean or 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    share = (
        upper.diagonal().reciprocal().square()
    )  # what an error of an input costs behind all that makes up for it
    left = weight.T.contiguous()  # what is still to be stored of each input, [K, N]
    codes, ranges = torch.empty(K, N, dtype=torch.uint8), torch.empty_like(known)
    group = 0
    for block in range(0, K, K // in_blocks or 1):
        end_of_block = block + K // in_blocks
        for begin in range(block, end_of_block, GROUP):
            end = min(begin + GROUP, end_of_block)
            counted = F.pad(share[begin:end] / share[begin:end].mean(), (0, GROUP - (end - begin)))
            of_group = _searched(_filled(left[begin:end].T), counted)
            of_group = known[:, group].where(~known[:, group].isnan(), of_group)
            scale, least = of_group.unbind(1)
            missed = torch.empty(end - begin, N)
            for i in range(begin, end):
                code = _codes(left[i][:, None], of_group)[:, 0]
                codes[i] = code
                missed[i - begin] = (left[i] - (code * scale + least)) / upper[i, i]
                left[i:end] -= upper[i, i:end, None] * missed[i - begin]
            left[end:] -= upper[begin:end, end:].T @ missed
            ranges[:, group], group = of_group, group + 1
    return codes.T.contiguous(), ranges
