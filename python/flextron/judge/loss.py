"""The loss of a model at a dial, in nats per token, and the restoration of a model that was changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from flextron.config import Widths
from flextron.judge.objectives import cross_entropy, imitation_of_top, top_logits, weighted
from flextron.nn import Dial
from flextron.nn.protocol import Elastic

_TOP = 256  # tokens whose share of a prediction is kept apart


@contextmanager
def restored(model: Elastic) -> Iterator[None]:
    """At the end of a ``with`` block, give an elastic model back its dial, router, mode and ``requires_grad``."""
    dial, router, training = model.dial, model.adaptive, model.training
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        model.train(training)
        model.attach_router(router)
        model.turn(dial)


def sequence_losses(model: Elastic, ids: Tensor) -> Tensor:
    """The mean loss of the next token in each sequence [B, T], as the model is set: [B], with a gradient."""
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.stack([cross_entropy(*pair) for pair in zip(logits.split(1), ids.split(1), strict=True)])


@torch.no_grad()
def evaluate(
    model: Elastic, tokens: Tensor, dials: Sequence[Widths | Dial], batch_size: int = 8
) -> list[float]:
    """The mean loss of the next token at each dial, without noise.

    Args:
        model: an elastic model; it is restored, whatever happens.
        tokens: [n, length] int64, every window a sequence of its own.
        dials: sub-networks, or dials such as one whose router chooses for every token.
        batch_size: windows in a forward pass; it does not change the result beyond rounding.

    Returns:
        One loss for each of ``dials``.
    """
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"evaluate: tokens must have shape [n >= 1, length >= 2], got {list(tokens.shape)}")
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be at least 1, got {batch_size}")
    device, losses = next(model.parameters()).device, []
    with restored(model):
        model.eval()
        for dial in dials:
            model.turn(Dial.of(dial))
            batches = [sequence_losses(model, ids.to(device)) for ids in tokens.split(batch_size)]
            losses.append(float(torch.cat(batches).mean()))
    return losses


def divergence(model: Elastic, tokens: Tensor, batch_size: int = 8) -> Callable[[Widths | Dial], float]:
    """A function from a dial to its mean KL divergence from what the full network predicts now, in nats per token.

    That is what the loss would rise by on text that the full network writes. It is 0 at the full network, and far less
    noisy than a difference of two losses: over 510 tokens, six steps of single layers of SmolLM2-135M diverge by 0.014
    to 0.038 nats, known to a tenth; their losses differ by 0.007 to 0.025, with errors of 0.009 to 0.015. The 256 most
    probable tokens count each, all others as one.

    Args:
        model: an elastic model; it is restored after each call.
        tokens: [n, length] int64, every window a sequence of its own.
        batch_size: windows in a forward pass.
    """
    batches = [ids.to(model.device) for ids in tokens.split(batch_size)]
    k = min(_TOP, model.elastic.vocab_size)

    @torch.no_grad()
    def each(dial: Widths | Dial) -> Iterator[Tensor]:
        with restored(model):
            model.eval()
            model.turn(Dial.of(dial))
            for ids in batches:
                yield model(input_ids=ids, use_cache=False).logits

    wanted = [imitation_of_top(top_logits(logits, k)) for logits in each(model.elastic.full())]

    def found(dial: Widths | Dial) -> float:
        terms = zip(each(dial), wanted, batches, strict=True)
        return sum(float(weighted(x, None, [(1.0, term)])[0]) * len(ids) for x, term, ids in terms) / len(
            tokens
        )

    return found
