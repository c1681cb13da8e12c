"""A causal LM whose head is left to the loss, which makes the logits a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flextron.nn.projection import fault_of_call
from flextron.nn.protocol import Elastic


def plain_head(model: Elastic) -> nn.Linear | None:
    """The head of a model whose logits are a linear layer's outputs; None where they are more, or less, than that."""
    a, head = model.anatomy, model.lm_head
    scaled = {"logits_scaling", "logit_scale"} & {*a.scales}
    capped = a.logit_cap and getattr(model.config, a.logit_cap, None) is not None
    if type(head) is not nn.Linear or scaled or capped or fault_of_call(head) is not None:
        return None
    return head


@contextmanager
def headless(model: Elastic, head: nn.Linear) -> Iterator[None]:
    """Within a ``with`` block, let a forward of the model return as logits what its head would read: [B, T, K].

    Where the head's weight is the embedding's, too, the rows of its tokens are added to the head's gradient in place:
    a gradient of the embedding alone would be as large as the head's, and nearly all zeros.
    """
    embedding: Any = model.get_input_embeddings()
    tied = embedding.weight is head.weight and head.weight.requires_grad and _is_plain(embedding)
    head.forward = _nothing  # type: ignore[method-assign, assignment]
    handle = embedding.register_forward_hook(_looked_up) if tied else None
    try:
        yield
    finally:
        del head.forward
        if handle is not None:
            handle.remove()


def _is_plain(embedding: nn.Module) -> bool:
    """Whether every token's row gets its gradient as it is."""
    return (
        type(embedding) is nn.Embedding
        and (embedding.padding_idx, embedding.max_norm) == (None, None)
        and not embedding.scale_grad_by_freq
    )


def _nothing(x: Any) -> Any:
    return x


def _looked_up(embedding: nn.Embedding, inputs: tuple[Tensor], found: Tensor) -> Tensor:
    """The rows that an embedding found, [.., K], whose gradient goes into that of its weight in place."""
    recorded = torch.zeros((), requires_grad=True)
    return _Rows.apply(recorded, inputs[0], found.detach(), lambda: embedding.weight)


class _Rows(torch.autograd.Function):
    """The weight comes in a function: as an input, its gradient would wait for that of the rows, and be another one."""

    @staticmethod
    def forward(
        ctx, recorded: Tensor, ids: Tensor, found: Tensor, weight: Callable[[], nn.Parameter]
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return found.view_as(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, dfound: Tensor) -> tuple[None, None, None, None]:
        (ids,), weight = ctx.saved_tensors, ctx.weight()
        if weight.grad is None:  # the head's gradient is not there yet, or nobody asked for it
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids.flatten(), dfound.flatten(0, -2).to(weight.grad.dtype))
        return None, None, None, None
