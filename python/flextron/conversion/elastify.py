"""Turn a stock checkpoint into an elastic one: score, sort, store, and prove that the stored model is the parent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from flextron import ranks
from flextron.artefacts.elastic_model import make_elastic, read_model, save_elastic
from flextron.artefacts.ladder import Ladder
from flextron.checkpoint import CONFIG_FILE, Origin
from flextron.checkpoint.card import write_card
from flextron.checkpoint.hf import TOKENIZER_FILES, foreign, read_tokenizer
from flextron.config import AXES, ElasticConfig, Widths
from flextron.conversion.adapters import adapter_in, merge_adapter
from flextron.conversion.importance import check_tokens, score
from flextron.conversion.likeness import as_like, prove_far, require_like
from flextron.conversion.parent import copy_parent, dtype_of, read_parent
from flextron.conversion.reorder import LayerOrder, identity_orders, random_orders, reorder, sorted_orders
from flextron.conversion.room import Room, room
from flextron.conversion.source import room_beside, source_of
from flextron.data import seeded
from flextron.nn import ElasticModel, elastic_config
from flextron.nn.allocator import give_back, large_apart
from flextron.nn.anatomy import liken, stop_dropping
from flextron.nn.placement import CPU
from flextron.nn.proof import difference, each_logits, logits_of, prove_sub_network, require_close
from flextron.nn.protocol import Elastic
from flextron.nn.skeleton import skeleton
from flextron.nn.storage import Dtype, common, counted, name_of, named, round_in_place, storage
from flextron.nn.widened import widened

ORDERS = ("importance", "none", "random")
_HELD_OUT = 4  # sequences kept from scoring, for the proof
_HELD_OUT_TOKENS = 128  # tokens of each, because logits of a large vocabulary are big
_SUB_NETWORKS = 2  # drawn for the proof


def convert(
    parent: PreTrainedModel | str | Path,
    out_dir: str | Path,
    *,
    calibration: Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    unit: str = "kv_group",
    aggregate: str = "l2",
    mlp_choices: tuple[int, ...] | None = None,
    head_choices: tuple[int, ...] | None = None,
    order: str = "importance",
    seed: int = 0,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
    dtype: Dtype = "auto",
    strip_prefix: str | None = None,
    like: str | None = None,
    adapter: str | Path | None = None,
    force: bool = False,
    device: torch.device = CPU,
    planned: Callable[[Room], Any] | None = None,
    used_up: bool = False,
    ladder: Ladder | None = None,
) -> dict[str, Any]:
    """Make an elastic checkpoint of a stock one.

    The certificate is about the files on disk: before they replace anything, stock transformers reads them back with
    its defaults, and so does our own loader. Arithmetic is float32, or float64 for a float64 parent. Weights are held
    once, in the narrowest dtype that holds the stored ones, and widened part by part as they are computed with.

    Args:
        parent: a loaded transformers causal LM (left as it is), a directory, or the id of a model on the hub.
        out_dir: the elastic checkpoint to write; stock transformers loads it as the full parent.
        calibration: [n, L] int64 token ids, at least two sequences; a few are held out for the proof.
        tokenizer: is stored with the model; None reads it from the directory when ``parent`` is one.
        unit: what the head axis counts, ``"kv_group"`` or ``"query"``.
        aggregate: how the scores of all tokens are combined, ``"l2"``, ``"mean_abs"`` or ``"variance"``.
        mlp_choices, head_choices: the menus of widths; quarters by default.
        order: how neurons and heads are sorted; ``"importance"``, or ``"none"`` and ``"random"`` for comparison.
        seed: decides the random order and which sub-networks are proven.
        batch_size: sequences in a scoring pass.
        progress: called after each scoring pass with sequences done and in all.
        dtype: what weights are stored in: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``, which keeps each
            tensor's own dtype.
        strip_prefix: a prefix to remove from every tensor's name, ``"_orig_mod."`` or ``"module."``.
        like: a family of the table whose layers those of the parent are like, where the table does not have the
            parent's own; it is stored if the certificate holds.
        adapter: the directory or hub id of a low-rank adapter, which peft merges into the parent's weights first; the
            merged model is then what the certificate calls the parent.
        force: replace the model that is in ``out_dir``, which must be new or empty otherwise.
        device: where to score and to prove.
        planned: called, before any weight is read, with the memory that the conversion takes.
        used_up: whether a loaded parent may lose its values, so that its memory becomes the copy's.
        ladder: the chain of sub-networks that budgets choose from until routers are trained; None: the uniform one.

    Returns:
        What ``flextron.json`` stores: ``dtypes``, ``importance`` and ``parity``. In that, ``max_abs`` and ``max_rel``
        are between the parent and what stock transformers read back, in ``dtype``, on ``tokens`` tokens. ``rounding``
        is the part that another dtype than the parent's brought, ``elastic`` is for the full model of our own loader,
        and each of ``sub_networks`` is the elastic model at widths drawn with ``seed`` against the plain model taken
        out of it. ``weights`` is the sha256 of the files that all this is about. ``dropped``: what the parent's
        configuration drops inside layers, by name; it is stored with zeros, since elastic layers drop nothing.

    Raises:
        ParityError: beside that rounding, one of them differs by more than 1e-4 of the largest logit; or a parent in
            memory does, from what its configuration and parameters say.
        ValueError: an argument, or a tensor of the parent, is not what it must be. Nothing was written.
    """
    if order not in ORDERS:
        raise ValueError(f"convert: order must be one of {', '.join(ORDERS)}, got {order!r}")
    if isinstance(parent, ElasticModel):
        raise ValueError("convert: parent must be a stock model, got one that is elastic already")
    drop = ranks.first(lambda: room_beside(parent, out_dir, force))
    source = source_of(parent, like) if isinstance(parent, str | Path) else None
    where = source or _home(parent)
    merged = None if adapter is None else adapter_in(adapter)
    if source is not None:
        with foreign(source / CONFIG_FILE, "a configuration that transformers reads"):
            hf_config = AutoConfig.from_pretrained(source)
    else:
        hf_config = copy.deepcopy(cast(PreTrainedModel, parent).config)
    liken(hf_config, like)
    require_like(hf_config)
    dropped = stop_dropping(hf_config)
    # what cannot be made elastic is refused before any work
    built = foreign("convert: parent", "a model that can be built", passed=(ValueError, NotImplementedError))
    with built, as_like(hf_config):
        config = elastic_config(hf_config, unit, mlp_choices, head_choices)
        make_elastic(skeleton(copy.deepcopy(hf_config)), config)
    check_tokens("convert", calibration, config.vocab_size, sequences=2)
    positions = getattr(hf_config, "max_position_embeddings", None) or calibration.shape[1]
    if calibration.shape[1] > positions:
        raise ValueError(
            f"convert: length must be at most the {positions} positions of the parent, got {calibration.shape[1]}"
        )

    held_out = min(_HELD_OUT, max(1, len(calibration) // 4))
    proof = calibration[-held_out:, :_HELD_OUT_TOKENS]
    if planned is not None:
        own = dtype_of(source if source is not None else cast(PreTrainedModel, parent))
        batch = (min(batch_size, len(calibration) - held_out), calibration.shape[1])
        planned(room(config, own, named("convert", dtype) or own, batch, (len(proof), proof.shape[1])))
    if source is not None:
        with foreign(source, "a model that transformers reads", passed=(ValueError, OSError)):
            model = read_parent(source, strip_prefix, device)
        tokenizer = tokenizer or _tokenizer_of(source)
    elif strip_prefix is not None:
        raise ValueError("convert: strip_prefix must be None when parent is a loaded model")
    else:
        model = copy_parent(parent, proof, device, used_up)
    if merged is not None:
        merge_adapter(model, merged)
    liken(model.config, like)
    stop_dropping(model.config)
    # now it is known whether the weights are tied
    config = elastic_config(model, unit, mlp_choices, head_choices)
    model.stored = storage("convert", model, dtype)

    work = common([torch.float32, model.dtype])
    logits = {} if _holds(model) else {"parent": logits_of(model, proof, work)}
    round_in_place("convert", model, model.stored)
    with widened(model), as_like(model.config):
        orders, found = _orders(
            model, config, calibration[:-held_out], order, aggregate, seed, batch_size, progress
        )
    give_back()
    logits["expected"] = logits_of(model, proof, work)
    prove_far(model, config, proof)

    def store() -> dict[str, Any]:
        reorder(model, orders, config)
        make_elastic(model, config)
        report = {"importance": found, "dtypes": counted(model.stored)}
        if dropped:
            report["dropped"] = dropped

        def prove(stage: Path, stock: PreTrainedModel, weights: str) -> dict[str, Any]:
            with as_like(hf_config):
                proven = _prove(stage, stock, config, proof, logits, seed, device)
            report["parity"] = {**proven, "weights": weights}
            if ladder is not None:
                report["ladder"] = {**ladder.to_dict(), "weights": weights}
            return report

        def beside(stage: Path, _: Origin) -> None:
            base = str(parent) if source is not None and not Path(str(parent)).exists() else None
            write_card(stage, where, f"{Path(out_dir).resolve().name}, elastic", _card(config, report), base)

        save_elastic(model, out_dir, tokenizer, {}, beside, prove=prove, drop=drop, empties=True)
        return report

    if not ranks.is_first():
        model.to("meta")  # rank 0 goes on alone
    with large_apart():
        return ranks.first(store)


def _holds(model: Elastic) -> bool:
    """Whether the dtypes that parameters are to be stored in hold any value that these can have."""
    return all(
        common([p.dtype, model.stored[name]]) == model.stored[name] for name, p in model.named_parameters()
    )


def _home(parent: Any) -> Path | None:
    """The directory that a loaded model was read from, if it was read from one."""
    name = getattr(parent, "name_or_path", "")
    return Path(name) if name and Path(name).is_dir() else None


def _card(config: ElasticConfig, report: dict[str, Any]) -> list[str]:
    """What the card of an elastic checkpoint says."""
    parity, full, small = report["parity"], config.params(config.full()), config.params(config.smallest())
    return [
        "One set of weights that holds a nested family of smaller models, made by "
        f"flextron: {full / 1e6:.2f} M parameters at full width, "
        f"{small / 1e6:.2f} M at the smallest.",
        f"At conversion, stock transformers read these files in {parity['dtype']} with logits within "
        f"{parity['max_rel']:.1e} of the parent's largest logit, on {parity['tokens']} tokens. `flextron info` tells "
        "what was done since.",
        f"MLP widths: {', '.join(map(str, config.mlp_choices))}. Heads (unit `{config.unit}`): "
        f"{', '.join(map(str, config.head_choices))}.",
        '```python\nimport flextron\n\nmodel = flextron.from_pretrained("DIRECTORY")\n'
        f"model.set_budget(params={(full + small) / 2:.0f})  # or memory_gb=; once profiled, a share of the latency\n"
        "```",
        "Stock transformers loads this directory as the full model.",
    ]


def _prove(
    stage: Path,
    stock: PreTrainedModel,
    config: ElasticConfig,
    proof: Tensor,
    logits: dict[str, Tensor],
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """The certificate of a staged checkpoint, in the arithmetic of the logits, on the very values that are on the disk.

    Args:
        stock: what stock transformers read from the stage, by default.
        proof: [n, L] token ids.
        logits: ``"expected"``, those that the stage must give, [n, L, V], which are the parent's unless a narrower
            dtype was requested; then ``"parent"`` has its own. They are taken out, and gone before sub-networks are
            proven.
    """
    dtype, whose = stock.dtype, "the parent's"
    expected, parent = logits.pop("expected"), logits.pop("parent", None)
    give_back()
    stock.to(device)
    found = require_close("convert", whose, expected, each_logits(stock, proof, expected.dtype))
    if parent is not None:
        found = difference(parent, each_logits(stock, proof, expected.dtype))
    stock.to("meta")  # room for the next
    give_back()
    elastic = read_model(stage, config, "auto", device=device)
    first = proof[:1]  # a wrong layer shows in one sequence
    full = require_close("convert", whose, expected[:1], each_logits(elastic, first, expected.dtype))
    rounding = difference(expected if parent is None else parent, expected)
    del expected, parent
    give_back()
    return {
        **found,
        "tokens": proof.numel(),
        "dtype": name_of(dtype),
        "elastic": full,
        "rounding": rounding,
        "seed": seed,
        "sub_networks": [
            prove_sub_network("convert", elastic, widths, first) for widths in _drawn(config, seed)
        ],
    }


def _drawn(config: ElasticConfig, seed: int) -> list[Widths]:
    """The sub-networks to prove: each layer at a width of its own, and no layer at its full one in all of them.

    Of a menu that begins at 0 one layer skips its part. More of them would leave a network that was never trained to
    do without, whose logits are what rounding made of them: 1.9e-4 of the largest, of SmolLM2 at even odds.
    """
    generator = seeded(f"certificate/{seed}")

    def draw(whole: tuple[int, ...], before: list[tuple[int, ...]]) -> tuple[int, ...]:
        menu = tuple(filter(None, whole))

        def one(layer: int) -> int:
            is_spared = len(menu) > 1 and before and all(widths[layer] == menu[-1] for widths in before)
            return menu[torch.randint(len(menu) - bool(is_spared), (), generator=generator)]

        drawn = [*map(one, range(config.num_layers))]
        if menu != whole:
            drawn[int(torch.randint(len(drawn), (), generator=generator))] = 0
        return tuple(drawn)

    found: list[Widths] = []
    for _ in range(_SUB_NETWORKS):
        before = [[getattr(widths, axis) for widths in found] for axis in AXES]
        found.append(Widths(*map(draw, config.menus, before)))
    # of these one configuration must say the heads, which the table knows of its own families only
    return [*found, config.narrowest()] if config.like else found


def _orders(
    model: Elastic,
    config: ElasticConfig,
    calibration: Tensor,
    order: str,
    aggregate: str,
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[LayerOrder], dict[str, Any]]:
    if order == "none":
        return identity_orders(config), {"order": order}
    if order == "random":
        return random_orders(config, seed), {"order": order, "seed": seed}
    importance = score(model, calibration, aggregate=aggregate, batch_size=batch_size, progress=progress)
    found = {"order": order, "aggregate": aggregate, "tokens": importance.tokens}
    return sorted_orders(importance, config), found


def _tokenizer_of(source: Path) -> PreTrainedTokenizerBase | None:
    return read_tokenizer(source) if any((source / name).is_file() for name in TOKENIZER_FILES) else None
