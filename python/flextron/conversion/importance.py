"""How important each neuron and each head of a model is, measured in forward passes; `reorder` sorts by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flextron import ranks
from flextron.nn.anatomy import anatomy_of
from flextron.nn.elastic_experts import hidden_of, sent

AGGREGATES = ("l2", "mean_abs", "variance")
Progress = Callable[[int, int], None]  # (sequences done, sequences in all)


@dataclass(frozen=True)
class Importance:
    """The scores of a model, layer by layer; a larger score is more important.

    Attributes:
        neurons: [F] float32 for each layer, or [E, F] where it has E experts.
        heads: [H] float32 for each layer, query heads in the parent's order.
        aggregate: how the scores of all tokens were combined.
        tokens: how many tokens were scored.
    """

    neurons: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]
    aggregate: str
    tokens: int

    def groups(self, num_kv_heads: int) -> tuple[Tensor, ...]:
        """[G] for each layer: the score of a key/value group is the sum over its query heads."""
        return tuple(heads.view(num_kv_heads, -1).sum(1) for heads in self.heads)


class _Moments:
    """Count, mean and summed squared deviation of each feature, in float32.

    Batches are merged pairwise (Chan et al. 1979): sums of squares would lose the variance of a feature whose
    mean is large.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(features, device=device)
        self.deviation = torch.zeros(features, device=device)

    def add(self, values: Tensor) -> None:
        """values [T, N] float32."""
        mean = values.mean(0)
        self.merge(values.shape[0], mean, (values - mean).square().sum(0))

    def merge(self, n: int, mean: Tensor, deviation: Tensor) -> None:
        total = self.count + n
        shift = mean - self.mean
        self.deviation = self.deviation + deviation + shift.square() * (self.count * n / total)
        self.mean = self.mean + shift * (n / total)
        self.count = total

    def aggregate(self, name: str) -> Tensor:
        """The L2 norm over tokens, their mean, or their variance."""
        if name == "l2":
            return (self.deviation + self.count * self.mean**2).sqrt().cpu()
        return (self.mean if name == "mean_abs" else self.deviation / max(1, self.count)).cpu()


def _of_all(moments: _Moments) -> _Moments:
    """The moments of what all processes have added, one after the other."""
    found = _Moments(moments.mean.numel(), moments.mean.device)
    counts = ranks.gathered(torch.tensor(moments.count))
    parts = zip(counts, ranks.gathered(moments.mean), ranks.gathered(moments.deviation), strict=True)
    for count, mean, deviation in parts:
        found.merge(int(count), mean, deviation)
    return found


def score(
    model: PreTrainedModel,
    calibration: Tensor,
    *,
    aggregate: str = "l2",
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Importance:
    """Measure neurons and heads of a stock model.

    The score of neuron i is ``|act(gate_i x) * (up_i x)|``, which is what the down projection sees of it. The score of
    head i is ``||head_i(x)||_2`` before the output projection. An expert's neurons are measured on the tokens that
    reach it. Both are combined over all tokens, in float32. Each of
    several processes measures its part of the sequences.

    Args:
        model: transformers causal LM, not elastic yet.
        calibration: [n, L] int64 token ids, no padding.
        aggregate: how the scores of all tokens are combined, ``"l2"``, ``"mean_abs"`` or ``"variance"``.
        batch_size: sequences in a forward pass.
        progress: called after each pass.

    Raises:
        ValueError: calibration is not token ids of this model, or aggregate is unknown.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"score: aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}")
    check_tokens("score", calibration, model.config.vocab_size)
    mine = ranks.rows_of("convert: samples", calibration)
    anatomy = anatomy_of(model.config)
    layers = anatomy.layers_in(model)
    experts, activation = anatomy.experts_of(model.config), anatomy.activation_in(model.config)
    size, number = (anatomy.whole(model.config).neurons, 1 if experts is None else experts.number)
    neurons = [[_Moments(size, model.device) for _ in range(number)] for _ in layers]
    heads = [_Moments(model.config.num_attention_heads, model.device) for _ in layers]

    def see_neurons(moments: _Moments, hidden: Tensor) -> None:
        moments.add(hidden.detach().float().abs().flatten(0, -2))

    def see_heads(moments: _Moments, hidden: Tensor) -> None:
        per_head = hidden.detach().float().unflatten(-1, (model.config.num_attention_heads, -1))
        moments.add(per_head.norm(dim=-1).flatten(0, -2))

    def see_experts(moments: list[_Moments], module: nn.Module, x: Tensor, chosen: Tensor, *_: Any) -> None:
        for expert, tokens, _place in sent(chosen):
            see_neurons(moments[expert], hidden_of(module, anatomy, activation, expert, x[tokens]))

    handles = []
    for i, layer in enumerate(layers):
        hooks: list[tuple[Any, Callable[..., None]]] = [
            (
                getattr(anatomy.attention_in(layer), anatomy.output),
                lambda _, args, moments=heads[i]: see_heads(moments, args[0]),
            )
        ]
        mlp, seen = anatomy.mlp_in(layer), neurons[i]
        if experts is None:
            down = getattr(mlp, anatomy.down)
            hooks.append((down, lambda _, args, moments=seen[0]: see_neurons(moments, args[0])))
        else:
            parts = getattr(mlp, anatomy.experts[1])
            hooks.append((parts, lambda part, args, moments=seen: see_experts(moments, part, *args)))
        handles += [module.register_forward_pre_hook(hook) for module, hook in hooks]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            for start in range(0, len(mine), batch_size):
                batch = mine[start : start + batch_size].to(model.device)
                model.base_model(input_ids=batch, use_cache=False)
                if progress:
                    progress(start + len(batch), len(mine))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return Importance(
        tuple(torch.stack([_of_all(m).aggregate(aggregate) for m in each]) for each in neurons)
        if experts
        else tuple(_of_all(each[0]).aggregate(aggregate) for each in neurons),
        tuple(_of_all(m).aggregate(aggregate) for m in heads),
        aggregate,
        calibration.numel(),
    )


def check_tokens(who: str, calibration: Tensor, vocab_size: int, sequences: int = 1) -> None:
    """Raise ValueError unless ``calibration`` holds at least ``sequences`` sequences of token ids."""
    if not isinstance(calibration, Tensor) or calibration.dim() != 2 or calibration.dtype != torch.int64:
        shape = (
            f"{list(calibration.shape)} {calibration.dtype}"
            if isinstance(calibration, Tensor)
            else calibration
        )
        raise ValueError(f"{who}: calibration must be token ids [n, L] int64, got {shape}")
    if calibration.shape[0] < sequences or calibration.shape[1] < 1:
        raise ValueError(
            f"{who}: calibration must hold at least {sequences} sequences of a token, "
            f"got {list(calibration.shape)}"
        )
    low, high = int(calibration.min()), int(calibration.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{who}: calibration must hold ids below {vocab_size}, got ids from {low} to {high}")
