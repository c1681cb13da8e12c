"""Hugging Face's files in a checkpoint: configurations and tokenizers, read so that a damaged one is one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from flextron.checkpoint.files import Files
from flextron.checkpoint.format import CONFIG_FILE, CheckpointError
from flextron.checkpoint.io import read_json
from flextron.checkpoint.schema import build
from flextron.sentences import first_line

GENERATION_FILE = "generation_config.json"
_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "head_dim",
)
_LAYERS = "num_hidden_layers"
# Fields of a generation configuration, which transformers reads without checking their types.
_SETTINGS: dict[type, tuple[str, ...]] = {
    int: (
        *(
            "max_length",
            "max_new_tokens",
            "min_length",
            "min_new_tokens",
            "top_k",
            "num_beams",
            "num_beam_groups",
        ),
        *("num_return_sequences", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    ),
    float: (
        *("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
        *("length_penalty", "diversity_penalty", "penalty_alpha", "guidance_scale", "max_time"),
    ),
    bool: (
        *(
            "do_sample",
            "use_cache",
            "output_attentions",
            "output_hidden_states",
            "output_scores",
            "output_logits",
        ),
        *("return_dict_in_generate", "remove_invalid_values", "renormalize_logits", "low_memory"),
    ),
    str: ("cache_implementation",),
    tuple[int, ...]: ("suppress_tokens", "begin_suppress_tokens"),
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id")


@contextlib.contextmanager
def foreign(
    path: str | Path, what: str, passed: tuple[type[Exception], ...] = (CheckpointError,)
) -> Iterator[None]:
    """Whatever another library raises over a user's file becomes: ``path`` must be ``what``, got its first line.

    Errors of the classes in ``passed`` are sentences already.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except passed:
        raise
    except BaseException as error:  # a panic of tokenizers' is no Exception
        raise CheckpointError(f"{path}: must be {what}, got {first_line(error)[:200]}") from None


def read_config(
    files: Files, weights: Mapping[str, tuple[int, ...]], without: Collection[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """The configuration of a model, and the JSON that it is made of.

    Args:
        files: the checkpoint's files, opened.
        weights: name -> shape of the tensors beside it: a configuration that asks for more is not built.
        without: fields that the configuration is made without.

    Raises:
        CheckpointError: one sentence that says what is wrong with it.
    """
    from transformers import CONFIG_MAPPING

    path, values = files / CONFIG_FILE, files.read_json(CONFIG_FILE)
    family = values.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise CheckpointError(f"{path}: model_type must be known to transformers, got {family!r}")
    with foreign(path, "a configuration that transformers reads"):
        config = CONFIG_MAPPING[family].from_dict({k: v for k, v in values.items() if k not in without})
    most = {name: sum(map(prod, weights.values())) for name in _SIZES} | {_LAYERS: len(weights)}
    for name, limit in most.items():
        size = getattr(config, name, 1)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= max(1, limit):
            raise CheckpointError(
                f"{path}: {name} must be a whole number that fits the weights, got {size!r:.40}"
            )
    return config, values


def read_generation_config(files: Files) -> Any:
    """The defaults of ``generate()``; None where there are none."""
    from transformers import GenerationConfig

    if GENERATION_FILE not in files:
        return None
    path, values = files / GENERATION_FILE, files.read_json(GENERATION_FILE)
    for kind, names in _SETTINGS.items():
        for name in names:
            build(kind | None, values.get(name), path, name)
    for name in _TOKENS:
        ids = values.get(name)
        build(tuple[int, ...] if isinstance(ids, list) else int | None, ids, path, name)
    with foreign(path, "a generation configuration that transformers reads"):
        return GenerationConfig.from_dict(values)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer; an error of the library that writes it becomes one sentence."""
    with foreign(folder, "written whole", passed=(CheckpointError, OSError)):
        tokenizer.save_pretrained(folder)


def read_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a model directory."""
    from transformers import AutoTokenizer

    if Path(directory).is_dir() and not any((Path(directory) / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{directory}: must hold a tokenizer ({' or '.join(TOKENIZER_FILES[:2])}), got none; save the parent's "
            "there with its save_pretrained"
        )
    for name in _TOKENIZER_JSON:
        if (Path(directory) / name).is_file():
            read_json(Path(directory) / name)
    with foreign(directory, "a directory with a tokenizer that transformers reads"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer("a")  # settings of a wrong type are noticed when they are used
    return tokenizer
