"""The MLP of a layer with experts, each of them at a width that may change between calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flextron.nn.elastic_mlp import ElasticMLP
from flextron.nn.policy import AxisDecision
from flextron_ext import elastic_mlp
from flextron_ext.reference import ACTIVATIONS as FUNCTIONS


class ElasticExperts(ElasticMLP):
    """``sum_e w_e MLP_e(x)`` over the experts that the parent's router chooses, each at the first ``width`` neurons.

    All experts of a layer have the same width. Experts that no token is sent to are not computed.
    """

    def _take(self, mlp: Any) -> None:
        self.projections = ()
        for name, module in mlp.named_children():
            if name in self.anatomy.experts:
                setattr(self, name, module)

    def _parts(self) -> tuple[Any, Any, Any]:
        raise NotImplementedError("ElasticExperts: an MLP with experts has no projections of its own")

    def _constant(self) -> Tensor | None:
        return None  # what an expert adds without neurons is left out where it is added

    def _run(
        self,
        x: Tensor,
        width: int,
        extent: Tensor | None = None,
        mixture: Tensor | None = None,
        choices: Sequence[int] | None = None,
    ) -> Tensor:
        router, experts = (getattr(self, name) for name in self.anatomy.experts)
        rows = x.flatten(0, -2)
        _, shares, chosen = router(rows)
        y = torch.zeros_like(rows)
        a = self.anatomy
        names = (a.up[0], a.down, *((f"{a.up[0]}_bias", f"{a.down}_bias") if a.paired else ()))
        held = [getattr(experts, name) for name in names]
        if (
            torch.is_grad_enabled()
        ):  # one gradient of all experts: each selected one's is as large, and mostly zeros
            held = [p.unbind() for p in held]
        for expert, tokens, places in sent(chosen):
            own = None if extent is None else extent.expand(len(rows))[tokens]
            mixed = None if mixture is None else mixture.expand(len(rows), -1)[tokens]
            weights = [p[expert] for p in held]
            out = self._one(experts, weights, rows[tokens], width, own, mixed, choices)
            y = y.index_add(0, tokens, (out * shares[tokens, places, None]).to(y.dtype))
        return y.view(x.shape)

    def _one(
        self,
        experts: Any,
        weights: Sequence[Tensor],
        x: Tensor,
        width: int,
        extent: Tensor | None,
        mixture: Tensor | None,
        choices: Sequence[int] | None,
    ) -> Tensor:
        """The tokens x [N, K] that are sent to one expert."""
        up, down, *biases = weights
        if not self.anatomy.paired:
            w_gate, w_up = up[: self.neurons], up[self.neurons :]
            none = (None, None, None)
            return elastic_mlp(
                x, w_gate, w_up, down, *none, width, self.activation, extent, gate=mixture, choices=choices
            )
        width = width if choices is None else choices[-1]
        hidden = paired(experts, up, biases[0], x, width)
        neurons = torch.arange(width, device=x.device)
        if extent is not None:
            hidden = hidden * (neurons < extent[:, None])
        if mixture is not None:
            kept_by = torch.tensor(choices, device=x.device)[:, None] > neurons  # [C, width]
            hidden = hidden * (mixture @ kept_by.to(mixture.dtype)).to(hidden.dtype)
        y = hidden @ down[:width] + biases[1]
        return AxisDecision(extent, mixture=mixture).without(y, biases[1], self.choices)


def sent(chosen: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that some token is sent to, those tokens, and its place among a token's experts.

    Args:
        chosen: [N, k] int64, the experts of each token. The host reads it.
    """
    for expert in chosen.unique().tolist():
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        yield expert, tokens, places


def paired(experts: Any, weight: Tensor, bias: Tensor, x: Tensor, width: int) -> Tensor:
    """The first hidden neurons [N, width] of an expert whose gate and up lie side by side."""
    return experts._apply_gate(x @ weight[:, : 2 * width] + bias[: 2 * width])


def hidden_of(experts: Any, anatomy: Any, activation: str, expert: int, x: Tensor) -> Tensor:
    """All hidden neurons [N, F] of an expert."""
    (name,) = anatomy.up
    if anatomy.paired:
        weight, bias = getattr(experts, name)[expert], getattr(experts, f"{name}_bias")[expert]
        return paired(experts, weight, bias, x, weight.shape[1] // 2)
    gate, up = (x @ getattr(experts, name)[expert].T).chunk(2, dim=-1)
    return FUNCTIONS[activation](gate) * up
