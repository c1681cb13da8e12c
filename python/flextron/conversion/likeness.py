"""Whether a family that is not in the table is built like one that is: its parameters, windows and late positions.

What is left to differ, the certificate of a conversion finds: it compares logits.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flextron.config import ElasticConfig
from flextron.nn import elastic_config, make_elastic
from flextron.nn.anatomy import Anatomy, Sizes, anatomy_of, like_of, size
from flextron.nn.families import head_size
from flextron.nn.proof import ParityError, require_close
from flextron.nn.skeleton import fill, say_tied, skeleton
from flextron.nn.widened import widened
from flextron.sentences import first_line, listed

_TYPES = {"full_attention", "sliding_attention"}
_WINDOWS = {"sliding_window", "use_sliding_window", "max_window_layers"}  # what `Anatomy.window` understands


@contextlib.contextmanager
def as_like(config: PreTrainedConfig) -> Iterator[None]:
    """Whatever is raised because a model is not built like the family that it names becomes one sentence of that."""
    if not (like := like_of(config)):
        yield
        return
    what = f"convert: like must be a family that is built like {config.model_type}, got {like}, with which this fails"
    try:
        yield
    except ParityError as error:
        raise ParityError(f"{what}: {str(error).removeprefix('convert: ')}") from None
    except (ValueError, NotImplementedError, OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {first_line(error)}; nothing was written") from error


def require_like(config: PreTrainedConfig) -> None:
    """Refuse a configuration whose layers have other parameters than those of the family that it names, if it does.

    Raises:
        ValueError: one sentence that names what is missing, what is not understood, or what has another shape.
    """
    if not (like := like_of(config)):
        return
    with as_like(config):
        faults = _faults(skeleton(copy.deepcopy(config)), anatomy_of(config))
    if faults:
        raise ValueError(
            f"convert: like must be a family that is built like {config.model_type}, got {like}: {faults}; "
            "nothing was written"
        )


def prove_far(model: PreTrainedModel, own: ElasticConfig, proof: Tensor) -> None:
    """Compare the model with its elastic self at its last positions, under a window that is shorter than the proof.

    The certificate sees the first positions, often fewer than the parent's own window has.

    Raises:
        ParityError: they differ.
    """
    if not like_of(model.config):
        return
    config = type(model.config).from_dict(model.config.to_dict())
    tokens = proof[:1].to(model.device)
    T = tokens.shape[1]
    positions = torch.arange(T, device=model.device)[None]
    positions += max(T, getattr(config, "max_position_embeddings", None) or T) - T
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = min(config.sliding_window, max(1, T // 4))
    say_tied(model, config)
    tensors = {name: p.detach() for name, p in model.named_parameters()}  # shared with the model

    @torch.no_grad()
    def logits(one: Any) -> Tensor:
        with widened(one):
            return one(input_ids=tokens, position_ids=positions, use_cache=False).logits.cpu()

    with as_like(config):
        stock, other = (fill(skeleton(copy.deepcopy(config)), tensors).to(model.device) for _ in range(2))
        elastic = make_elastic(other, elastic_config(other, own.unit, *own.menus))
        window = getattr(config, "sliding_window", None)
        whose = "the parent's at its last positions" + (f", with a window of {window}" if window else "")
        require_close("convert", whose, logits(stock), logits(elastic))


def _faults(model: Any, anatomy: Anatomy) -> str:
    """What of a model its anatomy does not say, or says and is not there; empty where there is nothing."""
    config = model.config
    paths = (anatomy.base, f"{anatomy.base}.{anatomy.layers}", f"{anatomy.base}.{anatomy.norm}", "lm_head")
    if missing := [path for path in paths if not _has(model, path)]:
        return f"it has no {listed(missing)}"
    names = ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size")
    if missing := [name for name in names if not isinstance(getattr(config, name, None), int)]:
        return f"its configuration has no {listed(missing)}"
    types = {*(getattr(config, "layer_types", None) or ())} - _TYPES
    if types:
        return f"its layer_types are not understood: {listed(sorted(types))}"
    spans = {
        name: value
        for name, value in config.to_dict().items()
        if ("window" in name or "chunk" in name) and name not in _WINDOWS and value
    }
    if spans:
        return f"its configuration's {listed(spans)} is not understood"
    modules, whole, D = _modules(anatomy), anatomy.whole(config), head_size(config)
    tensors = anatomy.tensors()
    for i, layer in enumerate(anatomy.layers_in(model)):
        at = f"{anatomy.layer_path(i)}."
        shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
        missing = [name for name in modules if not _has(layer, name)]
        missing += [
            name
            for name in tensors
            if name not in shapes and not any(name.startswith(f"{absent}.") for absent in missing)
            if not (name.endswith(".bias") and name.removesuffix(".bias") in modules)  # which some have
        ]
        if missing:
            return f"it has no {listed(at + name for name in missing)}"
        unknown = [
            name
            for name in shapes
            if name not in tensors and not any(name.startswith((f"{m}.", f"{m}_bias")) for m in modules)
        ]
        if unknown:
            return f"not understood: {listed(at + name for name in unknown)}"
        if wrong := [f"{at}{name} {found}" for name, found in _wrong(tensors, shapes, whole, D)]:
            return f"other shapes than its configuration says: {listed(wrong)}"
    return ""


def _modules(anatomy: Anatomy) -> list[str]:
    """The modules of a layer, from the layer."""
    a = anatomy
    names = [a.path(a.attention, name) for name in (*a.qkv, a.output, *a.head_norms)]
    inner = a.experts or (*a.up, a.down)
    names += [a.path(a.mlp, name) for name in inner]
    return names + [n for n in (a.attention_norm, a.attention_post, a.mlp_norm, a.mlp_post) if n]


def _wrong(
    tensors: dict[str, Any], shapes: dict[str, tuple[int, ...]], whole: Sizes, head: int
) -> Iterator[tuple[str, list[int]]]:
    """The parameters whose elastic dimensions are not as long as the configuration says."""
    for name, dims in tensors.items():
        shape = shapes.get(name)
        if shape is None:
            continue
        fits = len(shape) == len(dims) and all(
            not axes or size(axes, whole, head) == n for axes, n in zip(dims, shape, strict=True)
        )
        if not fits:
            yield name, list(shape)


def _has(model: Any, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
