"""How much memory a conversion takes: said in one line before it starts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flextron.config import ElasticConfig
from flextron.nn.storage import name_of
from flextron.scale.shapes import count, of_layer

# what the allocator keeps between tensors, and a share of the weights: measured at 0.1 and at 1.2 billion parameters
_HOLES, _SHARE = 32_000_000, 0.02
_ROWS = 3  # logits of a sequence, when they are compared: they, the difference and its absolute values


class Room(NamedTuple):
    """The bytes of a conversion at the moment when it takes most, beside the process itself.

    Attributes:
        weights: the model, once, in the narrowest dtype that holds what is stored.
        dtype: that one.
        logits: the parent's, kept for the proof.
        rest: what is computed with at that moment: activations, and the part of a layer that is float32.
    """

    weights: int
    dtype: torch.dtype
    logits: int
    rest: int

    @property
    def total(self) -> int:
        return self.weights + self.logits + self.rest

    def __str__(self) -> str:
        parts = {f"weights in {name_of(self.dtype)}": self.weights, "logits": self.logits, "work": self.rest}
        told = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
        return f"memory of the conversion: about {_gb(self.total)} ({told})"


def room(
    shape: ElasticConfig,
    dtype: torch.dtype,
    stored: torch.dtype,
    batch: tuple[int, int],
    proof: tuple[int, int],
) -> Room:
    """The memory of a conversion.

    Args:
        shape: the model's.
        dtype, stored: what its weights have in memory, the parent's and those that are read back.
        batch: sequences and tokens of each in a scoring pass.
        proof: the same of the proof.
    """
    params, layer = shape.params(shape.full()), of_layer(shape)
    wide = max(4, dtype.itemsize)
    K, F = shape.hidden_size, shape.intermediate_size
    mlp = sum(count({name: dims}) for name, dims in layer.items() if name.startswith("mlp"))
    part = wide * max(mlp, count(layer) - mlp)

    def activations(tokens: int) -> int:
        # of an MLP: what goes into the last projection, and three steps of its statistics; the stream and its norm
        return wide * tokens * (4 * F + 3 * K)

    def part_of(held: torch.dtype) -> int:
        return part if held.itemsize < 4 else 0

    logits = wide * proof[0] * proof[1] * shape.vocab_size
    row = logits // proof[0]
    kept = logits * (1 if torch.promote_types(dtype, stored) == stored else 2)
    given = shape.num_layers * proof[1] * K * wide
    alone = wide * (count(layer) + 2 * max(proof[1], K) * K) if stored.itemsize < 4 else 0

    def proven(held: torch.dtype) -> int:
        return max(part_of(held) + activations(proof[1]) + row, _ROWS * row)

    moments = [
        Room(
            params * dtype.itemsize, dtype, kept - logits, part_of(dtype) + activations(batch[0] * batch[1])
        ),
        Room(params * dtype.itemsize, dtype, kept, proven(dtype)),
        Room(params * stored.itemsize, stored, kept, proven(stored)),
        Room(params * stored.itemsize, stored, kept, alone + given + activations(proof[1])),
    ]
    most = max(moments, key=lambda room: room.total)
    return most._replace(rest=most.rest + _HOLES + round(_SHARE * most.weights))


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
