"""Write a sub-network as one GGUF file, which llama.cpp and what is built on it run; the tokenizer is in vocabulary.py.

Layers of different widths run in two of llama.cpp's architectures: ``deci``, whose layers are Llama's with biases at
most, and ``openelm``, whose layers norm queries and keys and whose embeddings are tied. Where all layers are alike the
family's own architecture is written; where neither fits, layers are padded with zeros to the widest.

A layer without attention and MLP changes nothing and is left out. What else an architecture cannot do without (a head
in the first layer, neurons behind an attention) is there as zeros.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flextron.artefacts.ladder import uniform_ladder
from flextron.artefacts.planner import planner_of
from flextron.checkpoint.io import replacing
from flextron.config import Widths
from flextron.exporting.llama_cpp import quantise
from flextron.exporting.vocabulary import add_vocabulary
from flextron.nn.anatomy import Sizes, row_of
from flextron.nn.plain import build, kept_sizes, widths_of
from flextron.nn.proof import difference, in_dtype, logits_of, require_close, require_same
from flextron.nn.protocol import Elastic

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k")
# JSON, only in a file of the full network; `flextron.conversion.gguf` reads it
ELASTIC_KEY, LADDER_KEY = "flextron.elastic", "flextron.ladder"
_LAYOUTS = ("auto", "uniform", "padded", "ragged")
_FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
    "q4_k": "MOSTLY_Q4_K_S",
}
_NARROWER = {
    "q4_k": "q5_0",
    "q5_0": "f16",
    "q4_0": "f16",
    "q8_0": "f16",
}  # where a row does not divide into blocks
_FEW = 32  # zero neurons behind an attention without an MLP: a block of the quantised types
_PROOF_SHAPE = (2, 64)  # sequences, tokens
_WHOSE = "the elastic model's at the budget"


@dataclass(frozen=True)
class _Family:
    """How llama.cpp runs a family: the architecture of layers that are alike, and the one of layers that are not."""

    alike: str
    ragged: str
    head_norms: bool = False


_FAMILIES = {
    "llama": _Family("llama", "deci"),
    "mistral": _Family("llama", "deci"),
    "ministral": _Family("llama", "deci"),
    "qwen2": _Family("qwen2", "deci"),
    "qwen3": _Family("qwen3", "openelm", head_norms=True),
}
_PAIRS = ("llama", "deci")  # their rotations turn neighbours, so rows of queries and keys are permuted


class _Entry(NamedTuple):
    """A tensor of the file, made of parameters one below the other.

    Attributes:
        name: in the file.
        parts: names of the parameters.
        heads: of each part, how many heads its rows are, where they are permuted; else 0.
    """

    name: str
    parts: tuple[str, ...]
    heads: tuple[int, ...]


def export_gguf(
    model: Elastic,
    file: str | Path,
    budget: Widths | float | None = None,
    *,
    kind: str = "f16",
    layout: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    **units: Any,
) -> dict[str, Any]:
    """Write a sub-network as one GGUF file, all of it or nothing.

    The file is read back before it replaces anything, and what its tensors compute is compared with the elastic model
    at the budget: it must be the same to rounding where they are ``"f32"``, and is reported where they are narrower.

    Args:
        model, budget, units: what `extract` takes.
        file: where to write; its name ends in ``.gguf`` and its directory exists.
        kind: what matrices are stored as, one of `TYPES`; vectors are float32. Rows that do not divide into the blocks
            of a quantised type (32 values, of ``"q4_k"`` 256) are stored in the next one that fits, and with 4 bits the
            head, or the embeddings that it is tied to, has 8.
        layout: ``"uniform"``, ``"padded"``, ``"ragged"``, or ``"auto"``: the smallest that llama.cpp runs.
        tokenizer: is stored inside, with its chat template.
        force: replace a file that is there.

    Returns:
        ``architecture``, ``layout``, ``widths``, ``params`` (in the file), ``types`` (tensors of each), ``bytes``,
        ``parity`` (``max_abs``, ``max_rel`` to the largest logit, ``tokens``, and ``float64`` as `export` gives it)
        and, where something is not as small as the sub-network or was left out, ``note``.

    Raises:
        NotImplementedError: llama.cpp's architectures do not compute this family, or something in its configuration.
        ValueError: an argument is not what it must be. Nothing was written.
        ModuleNotFoundError: gguf is not installed, or xllamacpp for a type that gguf cannot write.
    """
    import gguf

    file = Path(file)
    if kind not in TYPES:
        raise ValueError(f"export: type must be one of {', '.join(TYPES)}, got {kind!r}")
    if file.suffix != ".gguf":
        raise ValueError(f"export: out must end in .gguf, got {file}")
    if file.exists() and not force:
        raise ValueError(
            f"export: {file} must not be there yet, got a file; --force (force=True) replaces it"
        )
    widths = widths_of(model, budget, units)
    family = _family(model)
    plan = _planned(model, widths, family, layout)
    plain = build(model, widths, "ragged", held=plan.held).float()
    proof = _Proof(model, widths, plain)
    entries = list(_entries(plain, plan, family))
    parameters = {name: p.detach() for name, p in plain.named_parameters()}
    chosen = {e.name: _type(e, parameters, kind, plain) for e in entries}
    with replacing(file) as temporary:
        writer = gguf.GGUFWriter(temporary, plan.architecture)
        length = _describe(writer, model, plain, plan, kind)
        writer.add_name(model.name_or_path.rstrip("/").rpartition("/")[2] or "flextron")
        add_vocabulary(writer, tokenizer, model.config.vocab_size)
        if widths == model.elastic.full():
            writer.add_string(ELASTIC_KEY, json.dumps(model.elastic.to_dict()))
            ladder = planner_of(model).ladder if model.planner else uniform_ladder(model.elastic)
            writer.add_string(LADDER_KEY, json.dumps(ladder.to_dict()))
        if (factors := _rope_factors(plain)) is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        for entry in entries:
            type_ = getattr(gguf.GGMLQuantizationType, chosen[entry.name].upper())
            writer.add_tensor(entry.name, quantise(_value(entry, parameters), type_), raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _read_back(temporary, plain, entries)
        parity = proof.of(plain, exact=kind == "f32")
        size = temporary.stat().st_size
    types = [chosen[e.name] for e in entries]
    report: dict[str, Any] = {
        "architecture": plan.architecture,
        "layout": plan.layout,
        "widths": {**widths.to_dict(), "unit": model.elastic.unit},
        "params": sum(parameters[part].numel() for e in entries for part in e.parts),
        "types": {t: types.count(t) for t in dict.fromkeys(types)},
        "bytes": size,
        "parity": parity,
    }
    notes = [plan.note] if plan.note else []
    if length < model.config.max_position_embeddings:
        notes.append(
            f"llama.cpp's {plan.architecture} has no sliding window: the context is the window's {length} tokens, in "
            "which it hides nothing."
        )
    if notes:
        report["note"] = " ".join(notes)
    return report


def _family(model: Elastic) -> _Family:
    """How llama.cpp runs a model's family; NotImplementedError where it does not."""
    row, config = row_of(model.elastic), model.config
    if row not in _FAMILIES:
        raise NotImplementedError(
            f"export: the family must be one of {', '.join(_FAMILIES)} for --format gguf, got {row}; --format hf "
            "writes it for transformers"
        )
    family, rope = _FAMILIES[row], config.rope_parameters
    for what, value, allowed in (
        ("hidden_act", config.hidden_act, ("silu", "swish")),
        (
            "rope_type",
            rope["rope_type"],
            ("default",) if row.startswith("qwen") else ("default", "linear", "llama3"),
        ),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
        ("attention_bias", family.head_norms and config.attention_bias, (False,)),
    ):
        if value not in allowed:
            raise NotImplementedError(
                f"export: {what} of a {row} must be {' or '.join(map(str, allowed))} for --format gguf, got {value}"
            )
    return family


class _Plan(NamedTuple):
    """What is written of each layer.

    Attributes:
        held: the sizes of each layer, zeros included.
        layers: which layers are written.
    """

    architecture: str
    layout: str
    held: list[Sizes]
    layers: list[int]
    note: str


def _planned(model: Elastic, widths: Widths, family: _Family, layout: str) -> _Plan:
    if layout not in _LAYOUTS:
        raise ValueError(f"export: layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
    kept = kept_sizes(model.elastic, widths)
    layers = [i for i, s in enumerate(kept) if s.neurons or s.groups] or [0]
    needs_all = family.ragged == "openelm"
    lacks = "ties the embeddings" if needs_all and not model.elastic.tied else ""
    filled = [*kept]
    for i in layers:
        s = kept[i]
        if s.groups == 0 and (needs_all or i == layers[0]):
            s = Sizes(s.neurons, 1, 1)
        if s.neurons == 0 and (needs_all or s.groups):
            s = s._replace(neurons=_FEW)
        filled[i] = s
    if len({kept[i] for i in layers}) == 1 and layout in ("auto", "uniform"):
        one = filled[layers[0]]
        held = [one if i in layers else s for i, s in enumerate(kept)]
        features = one.groups * one.per_group * model.elastic.head_dim
        fits = family.alike != "qwen2" or features == model.config.hidden_size  # of its heads together
        return _Plan(family.alike if fits else family.ragged, "uniform", held, layers, "")
    if layout == "uniform":
        raise ValueError(
            "export: layout must be padded or ragged, got uniform: layers differ in their widths"
        )
    why = ""
    if lacks:
        why = (
            f"llama.cpp's only architecture with norms of heads and a width for each layer, openelm, {lacks}"
        )
        if layout == "ragged":
            raise ValueError(f"export: layout must be padded, got ragged: {why}")
    if layout == "padded" or why:
        widest = Sizes(*map(max, zip(*(filled[i] for i in layers), strict=True)))
        held = [widest if i in layers else s for i, s in enumerate(kept)]
        return _Plan(
            family.alike, "padded", held, layers, f"Padded to the widest layer: {why or 'asked for'}."
        )
    return _Plan(family.ragged, "ragged", filled, layers, "")


def _describe(writer: Any, model: Elastic, plain: PreTrainedModel, plan: _Plan, kind: str) -> int:
    """Write what llama.cpp asks of an architecture; returns the length of the context."""
    import gguf

    c, D, own = model.config, model.elastic.head_dim, [plan.held[i] for i in plan.layers]
    windows = [model.anatomy.window(c, i) for i in range(c.num_hidden_layers)]
    length = min([c.max_position_embeddings, *(w for w in windows if w is not None)])
    neurons = [s.neurons for s in own]
    heads, groups = [s.groups * s.per_group for s in own], [s.groups for s in own]
    if plan.layout != "ragged":
        neurons, heads, groups = neurons[0], heads[0], groups[0]  # type: ignore[assignment]
    writer.add_block_count(len(own))
    writer.add_context_length(length)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(neurons)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(D)
    writer.add_value_length(D)
    writer.add_rope_dimension_count(D)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return length


def _rope_factors(plain: PreTrainedModel) -> np.ndarray | None:
    """[D/2] float32: what llama.cpp divides each frequency of a head by; None where that is 1."""
    rope = plain.config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    scaled = plain.base_model.rotary_emb.inv_freq.double()
    D = 2 * len(scaled)
    own = rope["rope_theta"] ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    return (own / scaled.cpu()).float().numpy()


def _entries(plain: PreTrainedModel, plan: _Plan, family: _Family) -> Iterator[_Entry]:
    """The tensors of the file, each made of parameters that the plain model has."""
    known = dict(plain.named_parameters())
    permuted = plan.architecture in _PAIRS

    def entry(name: str, *parts: str, heads: tuple[int, ...] = ()) -> Iterator[_Entry]:
        if parts[0] in known:
            yield _Entry(name, parts, heads if heads and permuted else (0,) * len(parts))

    yield from entry("token_embd.weight", "model.embed_tokens.weight")
    yield from entry("output_norm.weight", "model.norm.weight")
    yield from entry("output.weight", "lm_head.weight")
    for place, i in enumerate(plan.layers):
        layer, to, s = f"model.layers.{i}", f"blk.{place}", plan.held[i]
        if s.groups:
            a = f"{layer}.self_attn"
            yield from entry(f"{to}.attn_norm.weight", f"{layer}.input_layernorm.weight")
            for kind in ("weight", "bias"):
                q, k, v = (f"{a}.{name}_proj.{kind}" for name in "qkv")
                if plan.architecture == "openelm":
                    yield from entry(f"{to}.attn_qkv.{kind}", q, k, v)
                else:
                    yield from entry(f"{to}.attn_q.{kind}", q, heads=(s.groups * s.per_group,))
                    yield from entry(f"{to}.attn_k.{kind}", k, heads=(s.groups,))
                    yield from entry(f"{to}.attn_v.{kind}", v)
                yield from entry(f"{to}.attn_output.{kind}", f"{a}.o_proj.{kind}")
            if family.head_norms:
                yield from entry(f"{to}.attn_q_norm.weight", f"{a}.q_norm.weight")
                yield from entry(f"{to}.attn_k_norm.weight", f"{a}.k_norm.weight")
        if s.neurons:
            yield from entry(f"{to}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight")
            for kind in ("weight", "bias"):
                for name in ("gate", "up", "down"):
                    yield from entry(f"{to}.ffn_{name}.{kind}", f"{layer}.mlp.{name}_proj.{kind}")


def _value(entry: _Entry, parameters: dict[str, Tensor]) -> np.ndarray:
    """What a tensor of the file holds, float32: the halves of permuted heads are interleaved."""
    parts = []
    for name, heads in zip(entry.parts, entry.heads, strict=True):
        t = parameters[name]
        parts.append(t.view(heads, 2, -1, *t.shape[1:]).transpose(1, 2).reshape(t.shape) if heads else t)
    return torch.cat(parts).cpu().contiguous().numpy()


@torch.no_grad()
def _read_back(path: Path, plain: PreTrainedModel, entries: list[_Entry]) -> None:
    """Give a plain model what a file holds."""
    import gguf

    reader = gguf.GGUFReader(path)
    stored, parameters = {t.name: t for t in reader.tensors}, dict(plain.named_parameters())
    for entry in entries:
        t = stored[entry.name]
        rows = torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32))
        start = 0
        for name, heads in zip(entry.parts, entry.heads, strict=True):
            p = parameters[name]
            own = rows[start : start + len(p)]
            start += len(p)
            p.copy_(own.view(heads, -1, 2, *own.shape[1:]).transpose(1, 2).reshape(p.shape) if heads else own)


def _type(entry: _Entry, parameters: dict[str, Tensor], kind: str, plain: PreTrainedModel) -> str:
    """The type that a tensor of the file has."""
    import gguf

    shape = parameters[entry.parts[0]].shape
    if len(shape) < 2:
        return "f32"
    head = "output.weight" if "lm_head.weight" in parameters else "token_embd.weight"
    chosen = "q8_0" if kind.startswith("q4") and entry.name == head else kind
    while shape[-1] % gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, chosen.upper())][0]:
        chosen = _NARROWER[chosen]
    return chosen


class _Proof:
    """Compares what tensors of a file compute with the elastic model at the budget, in float32 at least."""

    def __init__(self, model: Elastic, widths: Widths, plain: PreTrainedModel) -> None:
        draw = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(model.elastic.vocab_size, _PROOF_SHAPE, generator=draw)
        full = in_dtype(model, torch.float32)
        with full.budget(widths=widths):
            self.elastic, self.plain, self.more = require_same("export", _WHOSE, full, plain, self.tokens)

    def of(self, plain: PreTrainedModel, exact: bool) -> dict[str, Any]:
        logits = logits_of(plain, self.tokens)
        if exact:
            require_close("export", _WHOSE, self.plain, logits)
        found = difference(self.elastic, logits)
        if not math.isfinite(found["max_rel"]):
            raise ValueError("export: type must hold every weight, got f16, whose largest number is 65504")
        return {**found, "tokens": self.tokens.numel(), **self.more}
