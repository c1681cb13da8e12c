"""Runs every command of one part of docs/hosts.md on a small checkpoint: python tests/hosts_page.py llama.cpp

A part is a heading of the second level; it is run with the Python, and so in the environment, of its host. The commands
are given a folder with `elastic/`, a small checkpoint with latency tables, in the place of the reader's; paths
that begin with `python/` or `tests/` are the repository's. Python blocks run as programs of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from routing.synthetic import make_table

from flextron.artefacts.latency_files import save_tables
from flextron.artefacts.machine import machine_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "hosts.md"
_CORPUS = "The quick brown fox jumps over 13 lazy dogs; they don't mind, and sleep on.\n"


def parts(text: str) -> dict[str, str]:
    """Heading -> what is below it."""
    _, *found = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, body) of each block that is run."""
    return [b for b in re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def make_checkpoint(folder: Path) -> None:
    """A small Llama with a tokenizer like SmolLM2's, as an elastic checkpoint with latency tables."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import flextron

    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=letters
    )
    backend.train_from_iterator([_CORPUS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "parent")
    tokenizer.save_pretrained(folder / "parent")
    flextron.convert(str(folder / "parent"), str(folder / "elastic"), samples=8, length=32)
    model = flextron.from_pretrained(folder / "elastic", torch.float32, device="cpu")
    # costs on paper: measured ones of so small a model, beside whatever else runs, would allow other budgets each time
    tables = [make_table(model.elastic, phase) for phase in ("prefill", "decode")]
    save_tables([replace(table, machine=machine_of(model)) for table in tables], folder / "elastic")


def main(*names: str) -> int:
    found = parts(PAGE.read_text(encoding="utf-8"))
    if missing := [name for name in names if name not in found]:
        print(f"hosts_page: each part must be one of {', '.join(found)}, got {missing[0]}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder)
        for name in ("python", "tests"):
            (folder / name).symlink_to(ROOT / name)
        programs = folder / "bin"  # flextron and python of this environment, whichever others are installed
        programs.mkdir()
        for program, module in (("python", ""), ("flextron", " -m flextron")):
            (programs / program).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
            (programs / program).chmod(0o755)
        env = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        for name in names:
            for language, body in blocks(found[name]):
                print(f"== {name}\n{body}", end="", flush=True)
                program = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
                done = subprocess.run([*program, body], cwd=folder, env=env)
                if done.returncode:
                    print(f"hosts_page: it must succeed, got exit code {done.returncode}", file=sys.stderr)
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
