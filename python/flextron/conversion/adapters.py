"""Merges a low-rank adapter into the parent before anything is scored; peft computes the merge."""

from __future__ import annotations

import shlex
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from flextron.checkpoint import INDEX_FILE, WEIGHTS_FILE, CheckpointError, read_json
from flextron.checkpoint.hf import foreign
from flextron.checkpoint.hub import local
from flextron.checkpoint.io import parse_shapes
from flextron.sentences import listed

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def refuse_adapter(directory: Path) -> None:
    """Refuse an adapter where a whole model is wanted, with what merges it."""
    if not (directory / _CONFIG).exists():
        return
    got = f"{directory}: must hold a whole model, got an adapter ({_CONFIG})"
    if any((directory / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        raise CheckpointError(
            f"{got} beside it; move its adapter_* files into a folder of their own and name that by --merge-adapter"
        )
    base = read_json(directory / _CONFIG).get("base_model_name_or_path")
    base = shlex.quote(base) if base and isinstance(base, str) else "BASE"
    raise CheckpointError(f"{got}; name its base: flextron convert {base} DIR --merge-adapter {directory}")


def adapter_in(adapter: str | Path) -> Path:
    """The directory of an adapter, fetched from the hub if ``adapter`` is an id; checked before any work.

    Raises:
        CheckpointError: it has no adapter whose weights are safetensors.
        ModuleNotFoundError: peft is not installed.
    """
    import peft  # noqa: F401  # the command line says how to install it

    directory = local(adapter)
    if missing := [name for name in (_CONFIG, _WEIGHTS) if not (directory / name).is_file()]:
        raise CheckpointError(
            f"{directory}: must hold an adapter as {_CONFIG} and {_WEIGHTS}, got no {listed(missing)}"
        )
    read_json(directory / _CONFIG)
    return directory


def merge_adapter(model: PreTrainedModel, adapter: Path) -> None:
    """Add an adapter to the weights of a model, in place and in the weights' own dtypes.

    Args:
        model: in eval mode.
        adapter: what `adapter_in` gives.

    Raises:
        CheckpointError: it does not fit the model, in names or in shapes, or is of a kind that cannot be merged.
        ValueError: it adapts embeddings that are tied to the head, which a merge would change, too.
    """
    from peft import PeftModel, get_peft_model_state_dict

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = ends[0].weight is ends[1].weight
    with (adapter / _WEIGHTS).open("rb") as file:
        given = set(parse_shapes(adapter / _WEIGHTS, file))
    with (
        foreign(adapter, "an adapter of this model, that peft merges"),
        warnings.catch_warnings(action="ignore"),
    ):
        adapted: Any = PeftModel.from_pretrained(model, str(adapter), torch_device=str(model.device))
        own = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if odd := sorted(given ^ own):
        raise CheckpointError(
            f"{adapter}: must be an adapter of this model, got a difference in {listed(odd, 3)}"
        )
    if tied and ends != (model.get_input_embeddings(), model.get_output_embeddings()):
        raise ValueError(
            f"{adapter}: must not adapt embeddings or head of a parent that ties them, for a merge changes both, got "
            "one that does"
        )
    with foreign(adapter, "an adapter that peft merges"):
        adapted.merge_and_unload(safe_merge=True)
