"""The MLP of a layer, at a width that may change between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flextron.config import ElasticConfig
from flextron.nn.anatomy import Anatomy
from flextron.nn.policy import AxisDecision
from flextron.nn.projection import PackedLinear, bias_of, is_adapted, linear, rows_of, view_of
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
    """``W_down[:, :d] (act(W_gate[:d] x) * (W_up[:d] x))`` with d = ``width``, or without a gate; at 0, zeros.

    Where the layer decides for each token, d is the token's own, and at most ``width``.
    Takes over the projections of a transformers MLP; their names and tensors stay as they were.
    """

    layer: nn.Module
    projections: tuple[str, ...]

    def __init__(
        self,
        mlp: Any,
        anatomy: Anatomy,
        activation: str,
        config: ElasticConfig,
        settings: Settings,
        layer_idx: int,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise NotImplementedError(
                f"ElasticMLP: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        self.anatomy = anatomy
        self._take(mlp)
        self.activation = ACTIVATIONS[activation]
        self.neurons, self.choices = config.intermediate_size, config.mlp_choices
        self.settings, self.layer_idx = settings, layer_idx

    def _take(self, mlp: Any) -> None:
        """Take over the modules of a transformers MLP."""
        self.projections = (*self.anatomy.up, self.anatomy.down)
        if not self.anatomy.mlp:  # the layer itself has the projections, and goes on having them
            object.__setattr__(self, "layer", mlp)
            return
        for name, module in mlp.named_children():
            if name in self.projections:
                setattr(self, name, module)

    @property
    def owner(self) -> nn.Module:
        """The module that has the projections."""
        return self if self.anatomy.mlp else self.layer

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
        if width == 0:
            return torch.zeros_like(x)
        if decision.mixture is None:
            y = self._run(x, width, decision.extent)
        elif decision.extent is None or decision.choice is None:
            y = self._run(x, width, mixture=decision.mixture, choices=self.choices)
        else:
            y = self._by_choice(x.flatten(0, -2), width, decision.choice, decision.mixture).view(x.shape)
        return decision.without(y, self._constant(), self.choices)

    def _constant(self) -> Tensor | None:
        """What every token is given, however few neurons it keeps; None: nothing."""
        return bias_of(self.owner._modules[self.anatomy.down])

    def weights(self) -> list[nn.Parameter]:
        """The parameters that no other part of the layer has."""
        if not self.projections:
            return [*self.parameters()]
        owned: Any = self.owner._modules
        return [p for name in self.projections for p in owned[name].parameters()]

    def _run(
        self,
        x: Tensor,
        width: int,
        extent: Tensor | None = None,
        mixture: Tensor | None = None,
        choices: Sequence[int] | None = None,
    ) -> Tensor:
        """The tokens of x at a width, or each at its own extent; or a mixture of the choices' widths."""
        gate, up, down = self._parts()
        if type(down[0]) is Conv1D or any(is_adapted(proj) for proj, _ in (gate, up, down)):
            return self._run_adapted(x, width, extent, mixture, choices)
        if isinstance(up[0], PackedLinear):
            if mixture is not None:
                raise NotImplementedError(
                    "ElasticMLP: widths must not be mixed with packed weights, got a mixture"
                )
            up, down = up[0], down[0]
            panels = (up.panels, down.panels, up.scales, down.scales, up.format)
            biases = (up.gate_bias, up.bias, down.bias)
            return packed_mlp(
                x, *panels, *biases, width, down.out_features, self.anatomy.gated, self.activation, extent
            )
        (w_gate, b_gate), (w_up, b_up), (w_down, b_down) = (_tensors(*part) for part in (gate, up, down))
        assert w_up is not None and w_down is not None
        weights = (w_gate, w_up, w_down, b_gate, b_up, b_down)
        return elastic_mlp(x, *weights, width, self.activation, extent, gate=mixture, choices=choices)

    def _parts(self) -> tuple[Any, Any, Any]:
        """Gate, up and down projection, each with the rows that are meant of its outputs; a gate may be None."""
        owned, names = self.owner._modules, self.anatomy.up
        up, down = (owned[names[-1]], None), (owned[self.anatomy.down], None)
        if not self.anatomy.gated:
            return (None, None), up, down
        if len(names) == 2:
            return (owned[names[0]], None), up, down
        both, F = owned[names[0]], self.neurons
        if isinstance(both, PackedLinear):  # gate and up in one, panel by panel
            return (None, None), (both, None), down
        return (both, slice(0, F)), (both, slice(F, 2 * F)), down

    def halves(self, both: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
        """Gate and up of the projection that has both."""
        return view_of(both, slice(0, self.neurons)), view_of(both, slice(self.neurons, 2 * self.neurons))

    def _run_adapted(
        self,
        x: Tensor,
        width: int,
        extent: Tensor | None,
        mixture: Tensor | None,
        choices: Sequence[int] | None,
    ) -> Tensor:
        """The same, projection by projection, so that each may have low-rank adapters or be transposed."""
        width = width if choices is None else choices[-1]
        (gate, gate_rows), (up, up_rows), (down, _) = self._parts()
        hidden = linear(up, x, x.shape[-1], width, out_extent=extent, rows=up_rows)
        act = FUNCTIONS[self.activation]
        if gate is None:
            hidden = act(hidden)
        else:
            hidden = act(linear(gate, x, x.shape[-1], width, out_extent=extent, rows=gate_rows)) * hidden
        if mixture is not None:  # a neuron's share: the sum over the choices that keep it
            neurons = torch.arange(width, device=x.device)
            kept_by = torch.tensor(choices, device=x.device)[:, None] > neurons  # [C, width]
            share = (mixture @ kept_by.to(mixture.dtype)).to(hidden.dtype)
            hidden = (hidden.flatten(0, -2) * share).view(hidden.shape)
        return linear(down, hidden, width, x.shape[-1], extent)

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
        return f"width={self.width} of {self.neurons}, {self.activation}"


def _tensors(proj: Any, rows: slice | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of what is meant of a projection."""
    if proj is None:
        return None, None
    return rows_of(proj.weight, rows), rows_of(proj.bias, rows)
