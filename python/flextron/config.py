"""The description of an elastic model: its menus of widths, and one choice from them. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Generic, NamedTuple, TypeVar

UNITS = ("kv_group", "query")
SKIPPING = "skipping"  # menus may begin at 0: layers without an MLP or an attention

T = TypeVar("T")


class PerAxis(NamedTuple, Generic[T]):
    """One thing for each axis, in this order everywhere: in arguments, rows of routers, columns of files.

    Attributes:
        mlp: of the neurons of an MLP.
        heads: of the heads of an attention, counted in the configuration's unit.
    """

    mlp: T
    heads: T


AXES = PerAxis._fields
# what a configuration and its files call the menu of each axis
MENUS = PerAxis("mlp_choices", "head_choices")


@dataclass(frozen=True)
class Axis:
    """What an elastic model chooses a width of.

    Attributes:
        name: its name in `AXES`.
        menu: the widths it may take, ascending; the last is the parent's own. Where the first is 0, a layer may skip
            its MLP or its attention altogether, with the norms round it: how deep the network is varies too.
    """

    name: str
    menu: tuple[int, ...]


def plain(value: Any) -> Any:
    """A NumPy or torch scalar or array as a Python number or list; anything else unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def number(name: str, value: Any) -> float:
    """A Python, NumPy or torch number as a Python number; ValueError for anything else, bools and NaN included."""
    own = plain(value)
    if isinstance(own, bool) or not isinstance(own, Real) or own != own:
        raise ValueError(f"{name} must be a number, got {value!r}")
    return own if isinstance(own, int) else float(own)


def count(name: str, value: Any) -> int:
    """The same for a whole number."""
    if type(value) is int:
        return value
    own = plain(value)
    if isinstance(own, bool) or not isinstance(own, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(own)


def check_targets(who: str, targets: Sequence[float], to_full: bool = False) -> tuple[float, ...]:
    """Latency targets as a tuple of Python's own numbers.

    Raises:
        ValueError: they do not ascend within (0, 1]; or, with ``to_full``, are not at least two that end at 1.
    """
    own = tuple(number(f"{who}: targets", t) for t in targets)
    ascending = all(a < b for a, b in pairwise(own))
    if (
        not own
        or not ascending
        or not 0 < own[0] <= own[-1] <= 1
        or (to_full and (len(own) < 2 or own[-1] != 1))
    ):
        span = "from above 0 to 1" if to_full else "within (0, 1]"
        raise ValueError(f"{who}: targets must ascend {span}, got {list(own)}")
    return own


def check_numbers(config: Any) -> None:
    """Convert the int and float fields of a frozen dataclass to Python numbers; ValueError if one is not a number."""
    for field in fields(config):
        kind, _, optional = field.type.partition(" | ")
        value = getattr(config, field.name)
        if kind in ("int", "float") and not (optional and value is None):
            own = (count if kind == "int" else number)(f"{type(config).__name__}: {field.name}", value)
            object.__setattr__(config, field.name, own)


@dataclass(frozen=True)
class Widths:
    """One sub-network: what every layer keeps.

    Attributes:
        mlp: neurons kept in each layer's MLP; 0: the layer has none.
        heads: what each layer's attention keeps, counted in key/value groups (unit ``kv_group``) or in query heads of
            every group (unit ``query``); 0: the layer has no attention.
    """

    mlp: tuple[int, ...]
    heads: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp", tuple(count("widths: mlp", d) for d in self.mlp))
        object.__setattr__(self, "heads", tuple(count("widths: heads", n) for n in self.heads))

    @property
    def axes(self) -> PerAxis[tuple[int, ...]]:
        """The widths of the layers, axis by axis."""
        return PerAxis(*(getattr(self, name) for name in AXES))

    def covers(self, other: Widths) -> bool:
        """Whether every layer keeps at least what ``other`` keeps there."""
        pairs = zip(self.axes, other.axes, strict=True)
        return all(
            len(mine) == len(theirs) and all(a >= b for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in pairs
        )

    @classmethod
    def largest(cls, several: Sequence[Widths]) -> Widths:
        """The widest of any of them in each layer."""
        by_axis = zip(*(widths.axes for widths in several), strict=True)
        return cls(*(tuple(map(max, zip(*layers, strict=True))) for layers in by_axis))

    def to_dict(self) -> dict[str, list[int]]:
        """The widths of the layers by the axis' name."""
        return {name: list(layers) for name, layers in zip(AXES, self.axes, strict=True)}


@dataclass(frozen=True)
class Counts:
    """The parameters of a model, which are a linear function of what its layers keep.

    Attributes:
        fixed: parameters that are there at every width: embeddings, head, norms, biases of the hidden size.
        neuron, query, group: parameters of one neuron, one query head and one key/value head of a layer.
        active: those among ``neuron`` that one token is multiplied with: fewer where experts are chosen.
        embedding: those among ``fixed`` that are looked up, and multiplied with nothing but by a tied head.
    """

    fixed: int
    neuron: int
    query: int
    group: int
    active: int
    embedding: int

    def __post_init__(self) -> None:
        check_numbers(self)

    @classmethod
    def of_llama(cls, layers: int, hidden: int, head_dim: int, vocabulary: int, tied: bool) -> Counts:
        """A plain Llama's, whose projections have no biases."""
        embedding = vocabulary * hidden
        fixed = embedding * (1 if tied else 2) + hidden + layers * 2 * hidden
        neuron, head = 3 * hidden, 2 * hidden * head_dim
        return cls(fixed, neuron, head, head, neuron, embedding)


@dataclass(frozen=True)
class ElasticConfig:
    """The shape of the parent and the menus of widths its layers choose from.

    All layers have the same menus. A menu ascends, from 0 where a layer may skip the part, to the parent's own size.
    ``family`` is the ``model_type`` of the parent's configuration; ``like`` is the family of the table whose layers it
    has, if the table has no row of its own.
    """

    family: str
    unit: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    qk_norm: bool
    counts: Counts
    mlp_choices: tuple[int, ...]
    head_choices: tuple[int, ...]
    like: str = ""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in MENUS:
            menu = tuple(count(f"ElasticConfig: {name}", n) for n in getattr(self, name))
            object.__setattr__(self, name, menu)
        if self.unit not in UNITS:
            raise ValueError(f"ElasticConfig: unit must be one of {', '.join(UNITS)}, got {self.unit!r}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                "ElasticConfig: num_heads must be a multiple of num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        for name, menu, last in zip(MENUS, self.menus, self.whole, strict=True):
            if not menu or list(menu) != sorted(set(menu)) or menu[0] < 0 or menu[-1] != last:
                raise ValueError(
                    f"ElasticConfig: {name} must ascend from at least 0 to {last}, got {list(menu)}"
                )

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def axes(self) -> PerAxis[Axis]:
        """What the layers choose widths of."""
        return PerAxis(*(Axis(name, getattr(self, menu)) for name, menu in zip(AXES, MENUS, strict=True)))

    @property
    def menus(self) -> PerAxis[tuple[int, ...]]:
        """The widths that each axis chooses from."""
        return PerAxis(*(axis.menu for axis in self.axes))

    @property
    def choices(self) -> PerAxis[int]:
        """How many widths each axis chooses from."""
        return PerAxis(*map(len, self.menus))

    @property
    def whole(self) -> PerAxis[int]:
        """The parent's own width of each axis."""
        return PerAxis(mlp=self.intermediate_size, heads=self.max_heads)

    @property
    def max_heads(self) -> int:
        """The number of heads at full width, counted in the unit."""
        return self.num_kv_heads if self.unit == "kv_group" else self.heads_per_group

    def query_heads(self, heads: int) -> int:
        """How many query heads a width of the head axis keeps."""
        return heads * (self.heads_per_group if self.unit == "kv_group" else self.num_kv_heads)

    def kv_heads(self, heads: int, kv: str = "selected") -> int:
        """How many key/value heads are projected and cached at a width of the head axis."""
        if kv == "selected" and (self.unit == "kv_group" or heads == 0):
            return heads
        return self.num_kv_heads

    def full(self) -> Widths:
        return self.uniform(*(-1 for _ in AXES))

    def smallest(self) -> Widths:
        return self.uniform(*(0 for _ in AXES))

    def narrowest(self) -> Widths:
        """The smallest sub-network that skips nothing."""
        return self.uniform(*(int(menu[0] == 0) for menu in self.menus))

    def uniform(self, *indices: int) -> Widths:
        """The widths at these places of the menus, one for each axis, in every layer."""
        return self.widths((index,) * self.num_layers for index in indices)

    def widths(self, indices: Iterable[Sequence[int]]) -> Widths:
        """The sub-network at these places of the menus: of each axis, one for each layer."""
        return Widths(*(tuple(menu[i] for i in own) for menu, own in zip(self.menus, indices, strict=True)))

    def indices(self, widths: Widths) -> PerAxis[tuple[int, ...]]:
        """The places of a sub-network's widths in the menus."""
        return PerAxis(
            *(tuple(map(menu.index, own)) for menu, own in zip(self.menus, widths.axes, strict=True))
        )

    def check(self, widths: Widths) -> None:
        """Raise ValueError unless ``widths`` holds an entry of the menu for every layer and axis."""
        if not isinstance(widths, Widths):
            raise ValueError(f"widths: it must be a Widths, got {widths!r}")
        for axis, chosen in zip(self.axes, widths.axes, strict=True):
            if len(chosen) != self.num_layers:
                raise ValueError(
                    f"widths: {axis.name} must have one entry for each of {self.num_layers} layers, got {len(chosen)}"
                )
            for layer, width in enumerate(chosen):
                if width not in axis.menu:
                    raise ValueError(
                        f"widths: {axis.name}[{layer}] must be one of {list(axis.menu)}, got {width}"
                    )

    def params(self, widths: Widths, kv: str = "selected") -> int:
        """The number of parameters of the plain model that ``widths`` describes: its ``sum(p.numel())``.

        With ``kv="all"`` the key/value projections of unused groups are read too, and so they count.
        """
        c = self.counts
        return c.fixed + sum(
            c.neuron * d + c.query * self.query_heads(heads) + c.group * self.kv_heads(heads, kv)
            for d, heads in zip(widths.mlp, widths.heads, strict=True)
        )

    def flops(self, widths: Widths, length: int) -> int:
        """Floating-point operations of a sub-network for one token of a training sequence, forward and backward.

        ``6 N + 12 D T Σ H``: N parameters that are multiplied (not a separate embedding, nor experts that are not
        chosen), T tokens in a sequence, H query heads of a layer. PaLM (Chowdhery et al., arXiv 2204.02311, appendix B)
        counts so: a causal mask saves nothing, and what is computed again in the backward pass does not count.
        """
        c = self.counts
        N = self.params(widths) - (0 if self.tied else c.embedding) - (c.neuron - c.active) * sum(widths.mlp)
        heads = sum(map(self.query_heads, widths.heads))
        return 6 * N + 12 * self.head_dim * length * heads

    def memory_bytes(
        self,
        widths: Widths,
        *,
        batch: int = 1,
        context: int = 0,
        bytes_per_value: int = 4,
        kv: str = "selected",
    ) -> int:
        """Bytes that the weights and the KV cache of ``batch`` sequences of ``context`` tokens take."""
        cached = sum(2 * self.kv_heads(n, kv) * self.head_dim for n in widths.heads) * batch * context
        return (self.params(widths, kv) + cached) * bytes_per_value

    def differs(self, other: ElasticConfig) -> list[str]:
        """Every field in which ``other`` differs, as "name mine instead of theirs"; counts where nothing else does."""
        mine, theirs = self.to_dict(), other.to_dict()
        names = [k for k in mine | theirs if mine.get(k) != theirs.get(k)]
        names = [k for k in names if k != "counts"] or names
        return [f"{k} {mine.get(k)} instead of {theirs.get(k)}" for k in names]

    @property
    def requires(self) -> list[str]:
        """What a program must know to use a model of this description, beyond the format of its files."""
        return [SKIPPING] if any(menu[0] == 0 for menu in self.menus) else []

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them; ``like`` is there where it says something."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return values if self.like else {k: v for k, v in values.items() if k != "like"}

    @classmethod
    def from_stored(cls, values: Any) -> Any:
        """The fields of today, of what any version wrote.

        Format 1 had four families, which differed in biases and head norms. What a later version may have added is
        passed over: it would have told its readers that they must know it, see `requires`.
        """
        values = cls._from_older(values)
        names = {f.name for f in fields(cls)}
        return {k: v for k, v in values.items() if k in names} if isinstance(values, dict) else values

    @staticmethod
    def _from_older(values: Any) -> Any:
        flags = ("attention_bias", "output_bias", "mlp_bias")
        sizes = ("num_layers", "hidden_size", "head_dim", "vocab_size", "tied", "qk_norm")
        if not isinstance(values, dict) or "counts" in values or not {*flags, *sizes} <= values.keys():
            return values
        attention, output, mlp = (bool(values[flag]) for flag in flags)
        layers, hidden, size, vocabulary = (int(values[name]) for name in sizes[:4])
        plain = Counts.of_llama(layers, hidden, size, vocabulary, bool(values["tied"]))
        counts = Counts(
            plain.fixed + layers * (hidden * (mlp + output) + 2 * size * bool(values["qk_norm"])),
            plain.neuron + 2 * mlp,
            plain.query + size * attention,
            plain.group + 2 * size * attention,
            plain.neuron + 2 * mlp,
            plain.embedding,
        )
        return {name: value for name, value in values.items() if name not in flags} | {
            "counts": asdict(counts)
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ElasticConfig:
        values = cls.from_stored(values)
        if missing := sorted({f.name for f in fields(cls)} - values.keys() - {"like"}):
            raise ValueError(f"ElasticConfig: every field must be there, got none for {', '.join(missing)}")
        return cls(**values | {"counts": Counts(**values["counts"])})
