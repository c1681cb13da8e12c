"""How many bytes a training step takes on one rank: a model on paper of what `flextron.training` does. No torch here.

The peak is the largest of a few moments of a step: the teacher's forward, the loss, the head's backward, the first and
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
from flextron.scale.shapes import count, experts_of, kind_of, of_layer, of_root

FLOAT, HALF = 4, 2  # bytes of a float32 and of a bfloat16
# judge/objectives.py: logits of a chunk of the loss, and on a CPU; those that a head makes at once there, and the rows
# of its gradient
_LOSS_VALUES, _LOSS_VALUES_CPU, _HEAD_VALUES, _HEAD_ROWS = 1 << 23, 1 << 17, 1 << 25, 4096

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
    return max(_Sizes(shape, step, ranks).moments(), key=lambda memory: memory.total)


class _Sizes:
    """The sizes of what a step holds, in bytes. Letters: T tokens of this rank, V vocabulary, K width, F neurons.

    Where nothing is sharded, bfloat16 is autocast's: a float32 stream, and copies of the weights. Where weights are
    sharded it is FSDP2's mixed precision: weights are gathered in bfloat16, and the stream is bfloat16, too.
    """

    def __init__(self, shape: ElasticConfig, step: StepConfig, ranks: int) -> None:
        self.shape, self.step, self.ranks = shape, step, ranks
        self.shards = step.shards(ranks)
        self.sharded = self.shards > 1
        self.T = step.rows * step.length
        self.value = HALF if step.bf16 else FLOAT  # of what is computed
        self.casts = step.bf16 and not self.sharded
        self.stream = HALF if step.bf16 and self.sharded else FLOAT  # of the residual stream
        self.L, self.layer, self.root = shape.num_layers, count(of_layer(shape)), count(of_root(shape))
        self.my_layer = FLOAT * count(of_layer(shape), self.shards)
        self.mine = self.L * self.my_layer + FLOAT * count(of_root(shape), self.shards)
        self.logits = self.T * shape.vocab_size * self.value
        self.embedding = shape.vocab_size * shape.hidden_size
        self.distils = step.teacher != "none"
        gated = shape.counts.neuron >= 3 * shape.hidden_size
        self.ups = 2 if gated else 1  # projections before the MLP's activation: gate and up, or up alone
        self.kind, self.experts = kind_of(shape), experts_of(shape)
        # whether the loss runs the head, and leaves its gradients: a CPU's, where the logits are its outputs
        self.fuses = step.cpu and ranks == 1 and not self.kind.capped

    def at(self, moment: str, gradients: int, activations: int, gathered: int = 0) -> Memory:
        """What is alive at a moment; gradients that accumulation or DDP's buckets hold all along count as whole."""
        if self.step.accumulation > 1 or (self.ranks > 1 and not self.sharded):
            gradients = self.mine
        teacher = self.step.teacher_value * (self.L * self.layer + self.root)
        return Memory(
            parameters=self.mine,
            states=2 * self.mine,
            gradients=gradients,
            activations=activations,
            gathered=gathered,
            teacher={"none": 0, "cached": 0, "whole": teacher, "sharded": -(-teacher // self.shards)}[
                self.step.teacher
            ],
            moment=moment,
        )

    def moments(self) -> list[Memory]:
        saved = self._saved_by_layers()
        models = 1 + (
            self.step.teacher == "sharded"
        )  # FSDP2 keeps the root whole between forward and backward
        root = models * self.value * self.root if self.sharded else 0
        return [
            *([self.at("teacher", 0, self._teaching(), root)] if self.distils else []),
            *self._losses(saved, root),
            *(self._sharded_layers(saved, root) if self.sharded else self._whole_layers(saved)),
            self.at("optimiser", self.mine, 0),
        ]

    def _losses(self, saved: int, root: int) -> list[Memory]:
        if self.fuses:
            # which is scaled where it is one micro-batch's of several
            scaled = FLOAT * self.embedding * (self.step.accumulation > 1)
            return [
                self.at("loss", FLOAT * self.embedding, saved + max(scaled, self._loss_with_head()) + scaled),
            ]
        head = self._saved_by_head()
        return [
            self.at("loss", 0, saved + head + self._loss(), root),
            self.at("backward of the head", 0, saved + head + self._backward_of_head(), root),
        ]

    def _whole_layers(self, saved: int) -> list[Memory]:
        embedding, first = FLOAT * self.embedding, saved // self.L
        within = self._recomputed() + self._within_a_layer() + self._weight_gradients()
        done = self.mine - embedding - self.my_layer
        return [
            self.at("backward of the last layer", embedding, saved + within),
            self.at("backward of the first layer", done, first + within),
            # a tied embedding: the head's gradient waits for the embedding's, and their sum is a third; the embedding's
            # has the rows of the tokens alone where the loss made the head's
            self.at("end of the backward", self.mine, 2 * embedding * (self.shape.tied and not self.fuses)),
        ]

    def _sharded_layers(self, saved: int, root: int) -> list[Memory]:
        """FSDP2 (torch.distributed.fsdp.fully_shard): a layer's weights are gathered for it and, in the backward, the
        next layer's beside them; whole gradients of a layer, and of the root to the end, then a float32 copy to reduce.
        """
        weights, reducing = self.value * self.layer, FLOAT * self.layer
        within = self._recomputed() + self._within_a_layer()
        head = self.value * self.embedding
        middle = self.at(
            "backward of the second layer",
            (self.L - 2) * self.my_layer,
            2 * saved // self.L + within,
            root + head + 3 * weights + reducing,
        )
        return [
            self.at("backward of the last layer", 0, saved + within, root + head + 3 * weights),
            *([middle] if self.L > 2 else []),
            self.at(
                "backward of the first layer",
                (self.L - 1) * self.my_layer,
                saved // self.L + within,
                root + head + 2 * weights + reducing,
            ),
            self.at("end of the backward", self.L * self.my_layer, 0, root + FLOAT * self.root),
        ]

    def _saved_by_layer(self) -> int:
        """What the forward of one layer saves for its backward: nn/elastic_layer.py and the gradients of the ops."""
        s, T = self.shape, self.T
        K, F = s.hidden_size, s.intermediate_size
        q, k = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        norms = self.kind.norms * self._saved_by_norm(T, K, self.stream)
        # outputs of the norms before attention and MLP, one tensor each; autocast casts it for each of q, k, v and MLP
        inputs = T * K * self.value * (4 if self.casts else min(2, self.kind.norms))
        attention = T * (2 * q + 2 * k) * self.value + T * s.num_heads * FLOAT  # q, k, v, output, log of sums
        if s.qk_norm:
            attention += self._saved_by_norm(T * (s.num_heads + s.num_kv_heads), s.head_dim, self.value)
        # up and gated, before the activation
        hidden = (self.ups + self.kind.hidden) * T * F * (FLOAT if self.kind.wide else self.value)
        if self.experts:  # each has its own input and output
            hidden = self.experts.chosen * (hidden + 2 * T * K * self.value)
        return norms + inputs + attention + hidden + self._copies(self.layer)

    def _saved_by_norm(self, rows: int, width: int, value: int) -> int:
        """What a norm saves of its input, whose values take so many bytes, beside a number or two of each row."""
        saved = {"rms": FLOAT + value, "torch": FLOAT, "centred": 3 * FLOAT}[self.kind.norm]
        return rows * (width * saved + FLOAT)

    def _copies(self, parameters: int) -> int:
        """Autocast's bfloat16 copies of weights, which a backward reads."""
        return HALF * parameters if self.casts else 0

    def _saved_by_layers(self) -> int:
        if self.step.checkpoint_activations:
            return self.L * self.T * self.shape.hidden_size * self.stream  # each layer's input
        return self.L * self._saved_by_layer()

    def _recomputed(self) -> int:
        """What a checkpointed layer saves when it runs again."""
        return self._saved_by_layer() if self.step.checkpoint_activations else 0

    def _saved_by_head(self) -> int:
        """The last norm and the head."""
        T, K = self.T, self.shape.hidden_size
        weights = HALF * self.embedding if self.casts else 0
        capped = self.logits * self.kind.capped
        return self._saved_by_norm(T, K, self.stream) + T * K * self.value + weights + capped

    def _teaching(self) -> int:
        """In the teacher's MLP, its stream and hidden values; its weights where widened; or its logits."""
        T, K, F = self.T, self.shape.hidden_size, self.shape.intermediate_size
        widened = self.step.teacher_value < FLOAT and not self.sharded
        weights = FLOAT * self.shape.counts.neuron * F if widened else 0
        hidden = T * K * (self.stream + self.value) + (1 + self.ups) * T * F * self.value + weights
        return max(hidden, self.logits)

    def _loss(self) -> int:
        """Logits, their gradient, the teacher's logits, and float32 temporaries of one chunk."""
        return 2 * self.logits + self._theirs() + self._chunks()

    def _theirs(self) -> int:
        value = min(self.value, self.step.teacher_value)
        return self.T * self.shape.vocab_size * value if self.distils else 0

    def _chunks(self) -> int:
        V, T = self.shape.vocab_size, self.T
        rows = max(1, (_LOSS_VALUES_CPU if self.step.cpu else _LOSS_VALUES) // V)
        chunk = FLOAT * V * min(T, rows)
        most = 6 if self.distils else 1 + (rows < T)  # one is that of the chunk before
        return chunk * (most + self.step.bf16)

    def _loss_with_head(self) -> int:
        """What the head reads, as it is and as it is computed, the gradient of that, and the head as it is computed;
        the logits of some tokens, which become their gradient; a part of the head's gradient, beside the gradient."""
        V, T, K = self.shape.vocab_size, self.T, self.shape.hidden_size
        rows = min(T, max(1, _HEAD_VALUES // V))
        read = self._saved_by_norm(T, K, self.stream) + T * K * (FLOAT + self.value * self.casts)
        part = max(self._chunks(), K * self.value * max(min(V, _HEAD_ROWS), rows))
        weights = HALF * self.embedding if self.casts else 0
        return read + weights + rows * V * self.value + self._theirs() + part

    def _backward_of_head(self) -> int:
        """The gradient of the logits, beside the one that the loss left."""
        weights = self.embedding * (self.value + FLOAT * self.casts)  # as computed, and in float32
        return max(2 * self.logits, self.logits + weights + self.T * self.shape.hidden_size * self.value)

    def _within_a_layer(self) -> int:
        """Temporaries of a layer's backward: the MLP's, which are the largest (csrc/ops/mlp)."""
        T, K, F = self.T, self.shape.hidden_size, self.shape.intermediate_size
        stream = (
            T * K * (self.stream + 2 * self.value)
        )  # gradients of the stream, of the output and of the input
        hidden = (1 + self.ups) * T * F * self.value  # h, and the gradients of up and gated
        if self.experts:  # one after another
            hidden = hidden * self.experts.chosen // self.experts.number
        return stream + hidden

    def _weight_gradients(self) -> int:
        """Gradients of the MLP's weights as they are computed, before they are the parameters'."""
        one = (1 + self.ups) * self.shape.hidden_size * self.shape.intermediate_size
        # those of all experts, which are then joined
        return one * self.value + (one * FLOAT * self.experts.number if self.experts else 0)
