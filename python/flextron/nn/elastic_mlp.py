"""The MLP of a Llama-family layer, at a width that may change between calls."""

from __future__ import annotations

from torch import Tensor, nn

from flextron_ext import elastic_mlp

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

    Takes over the three projections of a transformers MLP; their names and tensors stay as they were.
    """

    def __init__(self, mlp: nn.Module, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise NotImplementedError(
                f"ElasticMLP: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.activation = ACTIVATIONS[activation]
        self.width = self.up_proj.out_features

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return elastic_mlp(
            x, gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias, self.width, self.activation
        )

    def extra_repr(self) -> str:
        return f"width={self.width} of {self.up_proj.out_features}, {self.activation}"
