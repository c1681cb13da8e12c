"""How many bytes a training step takes on one rank: a model on paper of what `flextron.training` does. No torch here.

The peak is the largest of a few moments of a step: the loss, the teacher's forward, the head's backward, the first and
the last layer's backward, the optimiser. Each is a sum of tensors that are alive then. The sub-network is the full
model, which a micro-batch may draw.

    parameters   4 P / S                   float32; S ranks share them (ZeRO, arXiv 1910.02054, section 3)
    states       8 P / S                   AdamW's two moments, float32
    gradients    4 P / S                   float32; DDP's buckets are the gradients
    activations  what each layer saves     counted as in Korthikanti et al., arXiv 2205.05198, section 4, for our ops

What CUDA, NCCL and the allocator take besides is not in it: `fits` leaves room for that.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from flextron.config import ElasticConfig
from flextron.recipes import StepConfig
from flextron.scale.shapes import count, of_layer, of_root

FLOAT, HALF = 4, 2  # bytes of a float32 and of a bfloat16
_LOSS_VALUES = 1 << 23  # logits of a chunk of the loss: judge/objectives.py

# Share of a device that tensors may fill. The rest is for the CUDA context and the libraries (half a gigabyte), NCCL's
# buffers, and blocks that the caching allocator cannot join. An assumption, not a measurement.
USABLE = 0.92


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment when a step takes most.

    Attributes:
        parameters, states, gradients: float32 weights, AdamW's moments, gradients that are complete at that moment.
        activations: all that belongs to the batch: what the forward saved, logits, temporaries.
        gathered: weights of other ranks that are here for a while, and gradients on their way to them.
        teacher: weights of the teacher.
        moment: which one it is.
    """

    parameters: int
    states: int
    gradients: int
    activations: int
    gathered: int
    teacher: int
    moment: str

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "moment")


def fits(
    shape: ElasticConfig, step: StepConfig, device_bytes: int, ranks: int = 1, usable: float = USABLE
) -> bool:
    """Whether a step of the model fits on each of ``ranks`` devices."""
    return estimate(shape, step, ranks).total <= usable * device_bytes


def estimate(shape: ElasticConfig, step: StepConfig, ranks: int = 1) -> Memory:
    """The memory that a step takes on each of ``ranks`` ranks."""
    return max(_moments(shape, step, ranks), key=lambda memory: memory.total)


def _moments(shape: ElasticConfig, step: StepConfig, ranks: int) -> list[Memory]:
    sizes = _Sizes(shape, step, ranks)
    return [sizes.at(*moment) for moment in sizes.moments()]


class _Sizes:
    """The sizes of what a step holds, in bytes. Letters: T tokens of this rank, V vocabulary, K width, F neurons."""

    def __init__(self, shape: ElasticConfig, step: StepConfig, ranks: int) -> None:
        self.shape, self.step = shape, step
        self.shards = step.shards(ranks)
        self.ranks = ranks
        self.T = step.rows * step.length
        self.value = HALF if step.bf16 else FLOAT  # of what is computed
        self.layer, self.root = count(of_layer(shape)), count(of_root(shape))
        self.L = shape.num_layers
        self.mine = self.L * count(of_layer(shape), self.shards) + count(of_root(shape), self.shards)
        self.logits = self.T * shape.vocab_size * self.value

    def at(self, moment: str, gradients: int, activations: int, gathered: int) -> Memory:
        """What is alive at a moment; gradients that the accumulation or DDP's buckets hold all along count as whole."""
        whole = FLOAT * self.mine
        if self.step.accumulation > 1 or (self.ranks > 1 and self.shards == 1):
            gradients = whole
        return Memory(
            parameters=whole,
            states=2 * whole,
            gradients=min(gradients, whole),
            activations=activations,
            gathered=gathered if self.shards > 1 else 0,
            teacher=self._teacher(),
            moment=moment,
        )

    def moments(self) -> list[tuple[str, int, int, int]]:
        """(name, gradients, activations, gathered) of each moment."""
        head_gradient = FLOAT * count(self._head(), self.shards)
        embedding_gradient = FLOAT * self.shape.vocab_size * self.shape.hidden_size
        saved, head = self._saved_by_layers(), self._saved_by_head()
        within = self._within_a_layer()
        kept = self._recomputed()
        forward, backward = self._gathered()
        root = self.root * self._gathered_value()
        everything = FLOAT * self.mine
        first = saved // self.L
        return [
            ("loss", 0, saved + head + self._loss(), root),
            ("backward of the head", 0, saved + head + self._backward_of_head(), root),
            ("backward of the last layer", head_gradient, saved + kept + within, root + backward),
            (
                "backward of the first layer",
                everything
                - embedding_gradient // self.shards
                - FLOAT * count(of_layer(self.shape), self.shards),
                first + kept + within,
                root + backward,
            ),
            ("end of the backward", everything, 2 * embedding_gradient * self.shape.tied, root),
            ("optimiser", everything, 0, 0),
        ]

    def _head(self) -> dict[str, tuple[int, ...]]:
        return {"head": (self.shape.vocab_size, self.shape.hidden_size)}

    def _teacher(self) -> int:
        size = self.step.teacher_value * (self.L * self.layer + self.root)
        return {"none": 0, "cached": 0, "whole": size, "sharded": -(-size // self.shards)}[self.step.teacher]

    def _saved_by_layer(self) -> int:
        """What the forward of one layer saves for its backward: nn/elastic_layer.py and the gradients of the ops."""
        s, T = self.shape, self.T
        K, F = s.hidden_size, s.intermediate_size
        q, k = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        norms = 2 * T * (2 * K + 1) * FLOAT  # of each norm: input, normalised input, 1 / root mean square
        # norms' outputs: one tensor in float32; autocast casts them for each of q, k, v and the MLP
        inputs = T * K * (4 * HALF if self.step.bf16 else 2 * FLOAT)
        attention = T * (2 * q + 2 * k) * self.value + T * s.num_heads * FLOAT  # q, k, v, output, log of sums
        if s.qk_norm:  # input in float32, normalised input, 1 / root mean square
            attention += T * ((q + k) * (FLOAT + self.value) + (s.num_heads + s.num_kv_heads) * FLOAT)
        hidden = 2 * T * F * self.value  # up and gated, before the activation
        return norms + inputs + attention + hidden + self._copies(self.layer)

    def _copies(self, parameters: int) -> int:
        """Autocast's bfloat16 copies of weights, which a backward reads."""
        return HALF * parameters if self.step.bf16 else 0

    def _saved_by_layers(self) -> int:
        if self.step.checkpoint_activations:
            return self.L * self.T * self.shape.hidden_size * FLOAT  # each layer's input
        return self.L * self._saved_by_layer()

    def _recomputed(self) -> int:
        """What a checkpointed layer saves when it runs again."""
        return self._saved_by_layer() if self.step.checkpoint_activations else 0

    def _saved_by_head(self) -> int:
        """The last norm and the head."""
        T, K, V = self.T, self.shape.hidden_size, self.shape.vocab_size
        return T * (2 * K + 1) * FLOAT + T * K * self.value + self._copies(V * K)

    def _loss(self) -> int:
        """Logits, the gradient that each term of the loss makes of them, and float32 temporaries of one chunk."""
        V = self.shape.vocab_size
        rows = max(1, _LOSS_VALUES // V)
        chunk = FLOAT * V * min(self.T, rows)
        distils = self.step.teacher != "none"
        chunks = (5 if distils else 1) + self.step.bf16 + (rows < self.T)  # one is that of the chunk before
        theirs = self.T * V * min(self.value, self.step.teacher_value) if distils else 0
        return self.logits * (3 if distils else 2) + theirs + chunk * chunks

    def _backward_of_head(self) -> int:
        """The gradient of the logits, beside those of the loss's terms."""
        terms = 2 if self.step.teacher != "none" else 1
        K, V = self.shape.hidden_size, self.shape.vocab_size
        weights = V * K * (HALF + FLOAT if self.step.bf16 else FLOAT)  # as computed, and in float32
        return max(self.logits * (terms + 1), self.logits + weights + self.T * K * self.value)

    def _within_a_layer(self) -> int:
        """Temporaries of a layer's backward: the MLP's, which are the largest (csrc/ops/mlp)."""
        s, T = self.shape, self.T
        K, F = s.hidden_size, s.intermediate_size
        stream = (
            T * K * (FLOAT + 2 * self.value)
        )  # gradients of the residual stream, of the output and of the input
        weights = 3 * K * F * self.value
        inside = 3 * T * F * self.value + weights  # h, up's and gated's gradients
        after = weights + K * F * FLOAT * self.step.bf16  # cast one by one
        return stream + max(inside, after)

    def _gathered_value(self) -> int:
        return FLOAT

    def _gathered(self) -> tuple[int, int]:
        """Buffers of FSDP2 around a layer, in its forward and in its backward."""
        weights, gradients = self.layer * self._gathered_value(), self.layer * FLOAT
        return 2 * weights, 2 * weights + 2 * gradients
