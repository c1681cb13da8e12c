"""The MLP of a Llama-family layer, at a width that may change between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flextron.config import ElasticConfig
from flextron.nn.policy import Kept, Policy
from flextron.nn.projection import PackedLinear, is_adapted, linear
from flextron.nn.setting import Settings
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

    With a policy, d is what it decided for each token in this layer's attention, and at most ``width``.
    Takes over the three projections of a transformers MLP; their names and tensors stay as they were.
    """

    PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

    def __init__(
        self, mlp: nn.Module, activation: str, config: ElasticConfig, settings: Settings, layer_idx: int
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

    @property
    def policy(self) -> Policy | None:
        return self.settings.now().policies[self.layer_idx]

    def forward(self, x: Tensor) -> Tensor:
        setting = self.settings.now()
        width = setting.widths.mlp[self.layer_idx]
        if setting.policies[self.layer_idx] is None:
            return self._run(x, width)
        kept = self.settings.decided(self.layer_idx).mlp
        if kept.gate is None:
            return self._run(x, width, kept.extent)
        if kept.extent is None:
            return self._run(x, width, gate=kept.gate, choices=self.choices)
        return self._by_choice(x.flatten(0, -2), width, kept).view(x.shape)

    def _run(self, x: Tensor, width: int, extent: Tensor | None = None, **soft: Any) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if is_adapted(gate) or is_adapted(up) or is_adapted(down):
            return self._run_adapted(x, width, extent, **soft)
        if isinstance(up, PackedLinear):
            if soft:
                raise NotImplementedError("ElasticMLP: gate must be None with packed weights, got a soft one")
            weights = (up.panels, down.panels, up.scales, down.scales, up.format)
            biases = (up.gate_bias, up.bias, down.bias)
            return packed_mlp(x, *weights, *biases, width, down.out_features, True, self.activation, extent)
        weights = (gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias)
        return elastic_mlp(x, *weights, width, self.activation, extent, **soft)

    def _run_adapted(
        self,
        x: Tensor,
        width: int,
        extent: Tensor | None,
        gate: Tensor | None = None,
        choices: Sequence[int] | None = None,
    ) -> Tensor:
        """The same, projection by projection, so that each may have low-rank adapters."""
        width = width if choices is None else choices[-1]
        up = linear(self.up_proj, x, x.shape[-1], width, out_extent=extent)
        gated = linear(self.gate_proj, x, x.shape[-1], width, out_extent=extent)
        hidden = FUNCTIONS[self.activation](gated) * up
        if gate is not None:  # a neuron's share: the sum of the choices that keep it
            neurons = torch.arange(width, device=x.device)
            kept_by = torch.tensor(choices, device=x.device)[:, None] > neurons  # [C, width]
            share = (gate @ kept_by.to(gate.dtype)).to(hidden.dtype)
            hidden = (hidden.flatten(0, -2) * share).view(hidden.shape)
        return linear(self.down_proj, hidden, width, self.down_proj.out_features, extent)

    def _by_choice(self, x: Tensor, width: int, kept: Kept) -> Tensor:
        """Straight-through: the tokens [N, K] of each choice together, at its width and through its gate.

        The op runs a gate at the largest of its choices. Those above a token's own share its fate here: what
        more they would add is not computed, so nothing is learnt of it from this token. The counts are read by
        the host, once a layer.
        """
        order = kept.choice.argsort(stable=True)
        counts = torch.bincount(kept.choice, minlength=len(self.choices)).tolist()
        parts = []
        for c, rows in enumerate(order.split(counts)):
            if counts[c]:
                gate = kept.gate[rows]
                gate = torch.cat([gate[:, :c], gate[:, c:].sum(1, keepdim=True)], dim=1)
                parts.append(self._run(x[rows], width, gate=gate, choices=self.choices[: c + 1]))
        return torch.cat(parts)[order.argsort()]

    def extra_repr(self) -> str:
        return f"width={self.width} of {self.up_proj.out_features}, {self.activation}"
