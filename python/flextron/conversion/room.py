"""How much memory a conversion takes: said in one line before it starts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flextron.config import ElasticConfig
from flextron.nn.storage import name_of
from flextron.scale.shapes import count, of_layer

# What the C library keeps between tensors beside what is counted here: 7 to 11 MB at 0.09 billion parameters and 123 MB
# at 1.2 billion on a Xeon (tests/peak.py), and 15 MB more at 0.09 billion on another machine.
_HOLES, _SHARE = 20_000_000, 0.05


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

    row = wide * proof[1] * shape.vocab_size  # logits of a sequence
    logits = proof[0] * row
    kept = logits * (1 if torch.promote_types(dtype, stored) == stored else 2)
    given = shape.num_layers * proof[1] * K * wide
    alone = wide * (count(layer) + 2 * max(proof[1], K) * K) if stored.itemsize < 4 else 0
    computed = max(activations(proof[1]), row)

    def at(held: torch.dtype, logits: int, rest: int) -> Room:
        weights = params * held.itemsize
        return Room(weights, held, logits, rest + _HOLES + round(_SHARE * weights))

    return max(
        at(dtype, kept - logits, part_of(dtype) + activations(batch[0] * batch[1])),
        at(dtype, kept, part_of(dtype) + computed),
        at(stored, kept, part_of(stored) + computed),
        at(stored, row, part_of(stored) + given + computed),  # a sub-network; the parent's logits are gone
        at(stored, row, alone + given + activations(proof[1])),  # one of its layers
        key=lambda room: room.total,
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
