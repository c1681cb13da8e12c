"""The time of a model at a dial, as measured here and, where a router chooses, as its latency table predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flextron.artefacts.latency_table import LatencyTable, Workload
from flextron.artefacts.noise import Noise
from flextron.config import Widths
from flextron.judge.loss import restored
from flextron.judge.timing import Comparison, NoiseWatch, Timing, clock_of, compare
from flextron.nn import Dial, ElasticCache
from flextron.nn.cache import ElasticCacheLayer
from flextron.nn.protocol import Elastic
from flextron.nn.rooms import repeated
from flextron.nn.router import Indices


class Latency(NamedTuple):
    """Milliseconds of a forward, and half the distance between the quartiles of its samples."""

    ms: float
    spread: float


@dataclass(frozen=True)
class Measurement:
    """What `measure` found: of the full model, of each other network, and how quiet the machine was.

    Attributes:
        errors: of each other network, the standard error of its share of the full model's time, over the share.
    """

    full: Latency
    others: tuple[Latency, ...]
    noise: Noise
    errors: tuple[float, ...]

    @classmethod
    def of(cls, reference: Timing, others: Sequence[Comparison], noise: Noise) -> Measurement:
        full = 1e3 * reference.median
        return cls(
            Latency(full, 500 * (reference.p75 - reference.p25)),
            tuple(Latency(full * other.ratio, full * other.half_spread) for other in others),
            noise,
            tuple(other.error for other in others),
        )


def measure(
    model: Elastic,
    widths: Sequence[Widths | Dial],
    workload: Workload,
    *,
    rounds: int = 5,
    min_seconds: float = 0.02,
    ids: Tensor | None = None,
    on_round: Callable[[int], object] | None = None,
    enough: Callable[[Measurement], bool] = lambda _: True,
) -> Measurement:
    """Milliseconds of the whole model: the full one, and one for each of ``widths``, which may be dials.

    Each configuration is timed between two runs of the full model. Its median ratio to them, times the full model's
    median, is returned: the drift of a shared machine cancels. On a GPU the time is that between two events on its
    stream, and a decode step is the replay of a captured graph, as in `generate`. ``ids`` [batch, length] are the
    tokens; random ones by default, which is all the same unless a router looks at them. After ``rounds`` rounds, and
    after each one from then on, ``enough`` is asked whether to stop.
    """
    choices = {str(i): Dial.of(w) for i, w in enumerate(widths)}
    choices["full"] = Dial.of(model.elastic.full())
    with restored(model):
        runs = {name: whole_model(model, dial, workload, ids) for name, dial in choices.items()}
        full, device = ("full", runs.pop("full")), model.get_input_embeddings().weight.device
        watch = NoiseWatch.on(device)

        def found(reference: Timing, others: Mapping[str, Comparison]) -> Measurement:
            own = [others[str(i)] for i in range(len(widths))]
            return Measurement.of(reference, own, watch.noise(reference.samples))

        return found(
            *compare(
                full,
                runs,
                rounds,
                min_seconds,
                setup=lambda name: model.turn(choices[name]),
                on_round=on_round,
                clock=clock_of(device),
                enough=lambda *so_far: enough(found(*so_far)),
            )
        )


def whole_model(
    model: Elastic, dial: Widths | Dial, workload: Workload, ids: Tensor | None = None
) -> Callable[[], object]:
    """The forward pass that is timed; the model must be set to ``dial`` when it runs."""
    weight = model.get_input_embeddings().weight
    shape = (workload.batch, workload.length)
    if ids is None:
        ids = torch.randint(model.elastic.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    if ids.shape != shape:
        raise ValueError(f"measure: ids must have shape {list(shape)} of the workload, got {list(ids.shape)}")
    ids = ids.to(weight.device)
    if workload.phase == "prefill":
        return torch.no_grad()(lambda: model(ids, logits_to_keep=1, use_cache=False))
    if step := repeated(model, ids, workload.context):  # what generation runs on a GPU
        return step
    cache = _filled_cache(model, dial, workload)

    @torch.no_grad()
    def run() -> None:
        model(ids, cache=cache, use_cache=True, logits_to_keep=1)
        for layer in cache.layers:
            layer.crop(-1)

    return run


def _filled_cache(model: Elastic, dial: Widths | Dial, workload: Workload) -> ElasticCache:
    """A cache of ``context`` random tokens, always the same ones, with the groups that ``dial`` keeps."""
    weight, config = model.get_input_embeddings().weight, model.elastic
    cache = ElasticCache()
    cache.layers.extend(ElasticCacheLayer() for _ in range(config.num_layers))
    dial, generator = Dial.of(dial), torch.Generator().manual_seed(0)
    for layer, heads in enumerate(dial.bound().heads):
        shape = (workload.batch, config.kv_heads(heads, dial.kv), workload.context, config.head_dim)
        states = torch.randn(shape, generator=generator).to(weight)
        cache.update(states, states, layer)
    return cache


@torch.no_grad()
def fractions(
    model: Elastic,
    table: LatencyTable,
    tokens: Tensor,
    targets: Sequence[float],
    phase: str,
    batch_size: int = 64,
) -> Tensor:
    """Fraction of the full latency, by the table, that the model's adaptive router takes at each target, [R].

    Every target sees all sequences of ``tokens`` [n, T]: R * n sequences, at most ``batch_size`` at once.
    """
    group = table.workload.batch if phase == "decode" else 1
    n = len(tokens) // group * group
    if n == 0:
        raise ValueError(
            f"fractions: tokens must be at least {group} sequences, the decode batch, got {len(tokens)}"
        )
    device, found = next(model.parameters()).device, []
    with restored(model):
        for some in torch.tensor(targets, dtype=torch.float64).split(max(1, batch_size // n)):
            model.turn(Dial.adaptive(model.elastic, some.tolist(), phase))
            with model.watched() as forwards:
                model(tokens[:n].to(device).repeat(len(some), 1), use_cache=False, logits_to_keep=1)
            choices = Indices(*(axis.unflatten(0, (len(some), n)) for axis in forwards[0]))
            found.append(table.of_tokens(choices) / table.full_ms)
    return torch.cat(found).cpu()
