"""Memory and speed of tokenising a large generated corpus and training from it: bench_tokens.py --gigabytes 10"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from flextron_lab.demo.tiny import config, train_tokenizer

_WORDS = 10_000


def paragraphs(draw: random.Random, count: int) -> list[str]:
    """Paragraphs of random words, common ones more often, as in a language."""
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(2, 9))) for _ in range(_WORDS)]
    often = [1 / (rank + 2) for rank in range(_WORDS)]
    return [" ".join(draw.choices(words, often, k=120)) + "." for _ in range(count)]


def write_corpus(folder: Path, size: int) -> None:
    """Write ``size`` bytes of text: half in one file of JSON lines, half in one plain file."""
    draw = random.Random(0)
    some = paragraphs(draw, 20_000)
    folder.mkdir(parents=True)
    for name, line in (("a.jsonl", lambda text: json.dumps({"text": text})), ("b.txt", lambda text: text)):
        with (folder / name).open("w") as file:
            while file.tell() < size // 2:
                file.writelines(line("\n\n".join(draw.choices(some, k=4))) + "\n" for _ in range(1000))


def tree_rss(pid: int) -> int:
    """Bytes of memory that a process and all that it started hold; pages that they share are counted in each."""
    total = 0
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        total += pages * os.sysconf("SC_PAGE_SIZE")
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += tree_rss(int(child))
    except OSError:  # it is gone
        pass
    return total


def measured(*argv: str) -> tuple[dict, float, int]:
    """Run a command of flextron; what it says in JSON, its seconds, and the peak of its processes' memory."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "flextron", *argv, "--json"], stdout=subprocess.PIPE)

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, tree_rss(process.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(said), time.perf_counter() - began, peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the text")
    parser.add_argument("--folder", default="bench-tokens", help="folder to work in, removed at the end")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that tokenise")
    parser.add_argument("--steps", type=int, default=5, help="training steps")
    args = parser.parse_args()

    folder = Path(args.folder)
    folder.mkdir()
    try:
        corpus, parent, elastic, tokens = (str(folder / n) for n in ("corpus", "parent", "elastic", "tokens"))
        write_corpus(Path(corpus), int(args.gigabytes * 1e9))
        size = sum(path.stat().st_size for path in Path(corpus).iterdir())
        train_tokenizer(paragraphs(random.Random(1), 200)).save_pretrained(parent)
        torch.manual_seed(0)
        LlamaForCausalLM(config()).save_pretrained(parent)

        print(f"text: {size / 1e9:.2f} GB in {len(list(Path(corpus).iterdir()))} files")
        said, seconds, peak = measured(
            "tokenize", corpus, tokens, "--model", parent, "--workers", str(args.workers)
        )
        print(
            f"tokenize, {args.workers} processes: {said['tokens'] / 1e6:.0f} M tokens in {seconds:.0f} s, "
            f"{size / seconds / 1e6:.2f} MB/s; peak {peak / 1e9:.2f} GB in all processes together"
        )
        _, seconds, peak = measured("tokenize", corpus, tokens, "--model", parent)
        print(f"the same again, which verifies: {seconds:.0f} s; peak {peak / 1e9:.2f} GB")
        _, seconds, peak = measured(
            "convert", parent, elastic, "--data", tokens, "--samples", "8", "--length", "128"
        )
        print(f"convert: {seconds:.0f} s; peak {peak / 1e9:.2f} GB")
        said, seconds, peak = measured(
            *("train", elastic, "--data", tokens, "--steps", str(args.steps), "--length", "128"),
        )
        print(
            f"train, {args.steps} steps: {seconds:.0f} s; peak {peak / 1e9:.2f} GB; loss {said['losses'][-1]:.3f}"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
