"""The MLP of a Llama-family layer, at a width that may change between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flextron.config import ElasticConfig
from flextron.nn.policy import AxisDecision
from flextron.nn.projection import PackedLinear, Projection, is_adapted, linear
from flextron.nn.setting import Setting, Settings
from flextron_ext import elastic_mlp, packed_mlp
from flextron_ext.reference import ACTIVATIONS as FUNCTIONS

# transformers' names of activations -> the op's
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


class ElasticMLP(nn.Module):
    """``W_down[:, :d] (act(W_gate[:d] x) * (W_up[:d] x))`` with d = ``width``.

    Where the layer decides for each token, d is the token's own, and at most ``width``.
    Takes over the three projections of a transformers MLP; their names and tensors stay as they were.
    """

    PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

    gate_proj: Projection
    up_proj: Projection
    down_proj: Projection

    def __init__(
        self, mlp: Any, activation: str, config: ElasticConfig, settings: Settings, layer_idx: int
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise NotImplementedError(
                f"ElasticMLP: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.activation = ACTIVATIONS[activation]
        self.choices = config.mlp_choices
        self.settings, self.layer_idx = settings, layer_idx

    @property
    def width(self) -> int:
        return self.settings.now().widths.mlp[self.layer_idx]

    def forward(
        self, x: Tensor, setting: Setting | None = None, decision: AxisDecision | None = None
    ) -> Tensor:
        """x [..., K]; setting and decision from the layer."""
        setting = setting or self.settings.now()
        if decision is None:
            decision = setting.by_width("ElasticMLP")
        width = setting.widths.mlp[self.layer_idx]
        if decision.mixture is None:
            return self._run(x, width, decision.extent)
        if decision.extent is None or decision.choice is None:
            return self._run(x, width, mixture=decision.mixture, choices=self.choices)
        return self._by_choice(x.flatten(0, -2), width, decision.choice, decision.mixture).view(x.shape)

    def _run(
        self,
        x: Tensor,
        width: int,
        extent: Tensor | None = None,
        mixture: Tensor | None = None,
        choices: Sequence[int] | None = None,
    ) -> Tensor:
        """The tokens of x at a width, or each at its own extent; or a mixture of the choices' widths."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if is_adapted(gate) or is_adapted(up) or is_adapted(down):
            return self._run_adapted(x, width, extent, mixture, choices)
        if isinstance(up, PackedLinear):
            if mixture is not None:
                raise NotImplementedError(
                    "ElasticMLP: widths must not be mixed with packed weights, got a mixture"
                )
            panels = (up.panels, down.panels, up.scales, down.scales, up.format)
            biases = (up.gate_bias, up.bias, down.bias)
            return packed_mlp(x, *panels, *biases, width, down.out_features, True, self.activation, extent)
        weights = (gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias)
        return elastic_mlp(x, *weights, width, self.activation, extent, gate=mixture, choices=choices)

    def _run_adapted(
        self,
        x: Tensor,
        width: int,
        extent: Tensor | None,
        mixture: Tensor | None,
        choices: Sequence[int] | None,
    ) -> Tensor:
        """The same, projection by projection, so that each may have low-rank adapters."""
        width = width if choices is None else choices[-1]
        up = linear(self.up_proj, x, x.shape[-1], width, out_extent=extent)
        gated = linear(self.gate_proj, x, x.shape[-1], width, out_extent=extent)
        hidden = FUNCTIONS[self.activation](gated) * up
        if mixture is not None:  # a neuron's share: the sum over the choices that keep it
            neurons = torch.arange(width, device=x.device)
            kept_by = torch.tensor(choices, device=x.device)[:, None] > neurons  # [C, width]
            share = (mixture @ kept_by.to(mixture.dtype)).to(hidden.dtype)
            hidden = (hidden.flatten(0, -2) * share).view(hidden.shape)
        return linear(self.down_proj, hidden, width, self.down_proj.out_features, extent)

    def _by_choice(self, x: Tensor, width: int, choice: Tensor, mixture: Tensor) -> Tensor:
        """Straight-through: the tokens [N, K] of each choice together, at its width and through its mixture.

        The op runs a mixture at the largest of its choices. Shares above a token's own choice are added to that one's:
        what wider choices would add is not computed, so this token teaches nothing about them. The host reads the
        counts, once a layer.
        """
        order = choice.argsort(stable=True)
        counts = torch.bincount(choice, minlength=len(self.choices)).tolist()
        parts = []
        for c, rows in enumerate(order.split(counts)):
            if counts[c]:
                shares = mixture[rows]
                shares = torch.cat([shares[:, :c], shares[:, c:].sum(1, keepdim=True)], dim=1)
                parts.append(self._run(x[rows], width, mixture=shares, choices=self.choices[: c + 1]))
        return torch.cat(parts)[order.argsort()]

    def extra_repr(self) -> str:
        return f"width={self.width} of {self.up_proj.out_features}, {self.activation}"
