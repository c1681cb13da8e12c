"""What a parent says beside its weights is with its child after every stage: template, added tokens, generation."""

from __future__ import annotations

import json
from pathlib import Path

from conversion.test_elastify import toy_tokenizer
from nn.models import small_model
from transformers import AutoTokenizer, GenerationConfig

from flextron import cli

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def said(directory: Path) -> tuple[str, list[int], dict[str, int], bool, dict[str, object]]:
    """A chat as text, ids of added tokens in a text, which tokens were added, whether one is special, the settings."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False)
    settings = GenerationConfig.from_pretrained(directory)
    kept = ("do_sample", "temperature", "top_k", "eos_token_id", "pad_token_id", "max_new_tokens")
    return (
        chat,
        tokenizer("w5 <|user|> w7 <tool>")["input_ids"],
        tokenizer.get_added_vocab(),
        "<|user|>" in tokenizer.all_special_tokens,
        {name: getattr(settings, name) for name in kept},
    )


def test_template_added_tokens_and_generation_settings_reach_an_export(tmp_path: Path) -> None:
    parent = small_model(vocab_size=64)
    parent.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=9, eos_token_id=[2, 61], pad_token_id=0, max_new_tokens=5
    )
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = TEMPLATE
    folders = [tmp_path / name for name in ("parent", "elastic", "small")]
    for part in (parent, tokenizer):
        part.save_pretrained(folders[0])
    text = tmp_path / "text.jsonl"
    words = [" ".join(f"w{(i * j) % 61}" for j in range(1, 80)) for i in range(1, 40)]
    text.write_text("\n".join(json.dumps({"text": line}) for line in words))
    source, elastic, small = map(str, folders)
    short = ("--data", str(text), "--length", "8")
    expected = said(folders[0])
    assert expected[:2] == ("<|user|>w5", [5, 61, 7, 62]) and expected[3]
    for argv, made in (
        (("convert", source, elastic, "--samples", "4", *short), folders[1]),
        (("train", elastic, "--steps", "1", "--batch-size", "1", *short), folders[1]),
        (("export", elastic, small, "--params", "1e9"), folders[2]),
    ):
        assert cli.main([*argv, "--device", "cpu"] if argv[0] != "export" else list(argv)) == 0
        assert said(made) == expected, argv[0]
