"""A tokenizer of transformers as llama.cpp stores it in a GGUF file."""

from __future__ import annotations

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is split before its pieces are merged -> llama.cpp's name of it. A step is a pattern, "digits" one by one, or
# "words", the pattern of GPT-2.
_SPLITTERS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_ENDINGS + _SPLIT % r"\p{N}{1,3}",): "llama-bpe",
    (_ENDINGS + _SPLIT % r"\p{N}",): "qwen2",
    (_TEKKEN,): "tekken",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase | None, size: int) -> None:
    """Write a tokenizer and its chat template into a GGUF file; None: a file whose tokens have no texts.

    Args:
        size: rows of the embedding; those that the tokenizer does not use become unused tokens.

    Raises:
        NotImplementedError: llama.cpp has no name for what the tokenizer does.
    """
    import gguf

    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise NotImplementedError("export: tokenizer must be one of the library tokenizers, got another")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise NotImplementedError(
            f"export: tokenizer must merge pairs (BPE) for --format gguf, got {model['type']}"
        )
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    pieces = bool(
        model.get("byte_fallback")
    )  # SentencePiece's: merges are found by the scores of what they give
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(_prefixed(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(described["pre_tokenizer"]))
        writer.add_token_merges([" ".join(m) for m in merges])
    rank: dict[str, int] = {}
    for place, pair in enumerate(merges):
        rank.setdefault("".join(pair), place)
    added, kinds = {t["id"]: t for t in described["added_tokens"]}, gguf.TokenType
    vocabulary = {i: text for text, i in tokenizer.get_vocab().items()}
    texts, types, scores = [], [], []
    for i in range(size):
        text = vocabulary.get(i)
        kind = kinds.UNUSED if text is None else kinds.NORMAL
        if i in added:
            text, kind = added[i]["content"], kinds.CONTROL if added[i]["special"] else kinds.USER_DEFINED
        if pieces and i == tokenizer.unk_token_id:
            kind = kinds.UNKNOWN
        elif pieces and text is not None and _BYTE.fullmatch(text):
            kind = kinds.BYTE
        texts.append(f"[PAD{i}]" if text is None else text)
        types.append(kind)
        scores.append(-float(rank.get(texts[-1], len(merges))))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if pieces:
        writer.add_token_scores(scores)
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    with_ends = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and with_ends[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and with_ends[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _prefixed(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a space is put before the text."""
    return tokenizer.tokenize("a")[0].startswith("▁")


def _splitter(described: dict[str, Any] | None) -> str:
    """llama.cpp's name of how a tokenizer splits text."""
    steps = _steps(described)
    if steps not in _SPLITTERS:
        raise NotImplementedError(
            "export: tokenizer must split text as one that llama.cpp has a name for "
            f"({', '.join(_SPLITTERS.values())}), got {' then '.join(map(str, steps)) or 'no splitting'}"
        )
    return _SPLITTERS[steps]


def _steps(described: dict[str, Any] | None) -> tuple[str, ...]:
    if described is None:
        return ()
    kind = described["type"]
    if kind == "Sequence":
        return tuple(step for one in described["pretokenizers"] for step in _steps(one))
    if kind == "ByteLevel" and not described.get("add_prefix_space"):
        return ("words",) if described.get("use_regex", True) else ()
    if kind == "Digits" and described.get("individual_digits"):
        return ("digits",)
    if kind == "Split" and described.get("behavior") == "Isolated" and not described.get("invert"):
        pattern = described["pattern"]
        return (pattern.get("Regex") or re.escape(pattern.get("String", "")),)
    return (kind,)
