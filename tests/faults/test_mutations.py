"""A thousand damaged files, each before the command that reads it: one sentence or no harm, and nothing is written."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import digest
from mutations import mutated
from nn.models import small_model
from routing.synthetic import make_table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flextron import pipeline
from flextron.artefacts.latency_files import save_tables
from flextron.artefacts.machine import machine_of
from flextron.exporting import export
from flextron.inference import from_pretrained
from flextron.recipes import AdaptiveConfig, RouteConfig, TrainConfig

CASES = int(os.environ.get("FLEXTRON_FAULT_CASES", "1000"))
WORKERS = 2
WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far", "away"),
    *("from", "old", "red", "house", "by", "sea", "while", "it", "rained"),
)
_PROGRESS = re.compile(
    r".* \d+/\d+(, .+)?|computes in .+|memory of (a step|the conversion): .+|flextron: warning: .+"
)
_NOISE = re.compile(r"Ignored unknown kwarg option .*\n")  # tokenizers prints it itself, on standard output


@dataclass(frozen=True)
class Reader:
    """A command and the files that it reads.

    Attributes:
        folder: the folder of the fixture.
        files: patterns of those to damage.
        argv: the command; ``{}`` stands for the folder.
        share: how large a part of the cases it gets.
        sure: files that a checksum covers: whatever happens to them must be told.
    """

    folder: str
    files: tuple[str, ...]
    argv: tuple[str, ...]
    share: float
    sure: tuple[str, ...] = ()


_WEIGHTS = ("model.safetensors", "config.json")
_ROUTERS = ("routers.json", "routers.safetensors", "adaptive.json", "adaptive.safetensors")
READERS = (
    Reader("elastic", ("flextron.json", *_WEIGHTS), ("info", "{}", "--json"), 0.15, _WEIGHTS),
    Reader(
        "elastic",
        (*_ROUTERS, "latency/*.json"),
        ("info", "{}", "--json"),
        0.2,
        ("routers.safetensors", "adaptive.safetensors"),
    ),
    Reader(
        "elastic",
        (
            "adaptive.json",
            "latency/*.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ),
        ("generate", "{}", "--budget", "0.8", "--adaptive", "--prompt", "the cat", "--max-new-tokens", "2"),
        0.1,
    ),
    Reader("uniform", ("export.json", *_WEIGHTS, "generation_config.json"), ("plain", "{}"), 0.12, _WEIGHTS),
    Reader("ragged", ("export.json", *_WEIGHTS), ("plain", "{}"), 0.12, _WEIGHTS),
    Reader("bare", ("config.json", "model.safetensors"), ("plain", "{}"), 0.06),
    Reader(
        "training",
        ("run.json", "metrics.jsonl", "step-*.json", "step-*/*.safetensors"),
        ("resume", "{}"),
        0.1,
    ),
    Reader(
        "parent",
        ("*.json", "*.safetensors"),
        ("convert", "{}", "{}/../out", "--data", "{}/../text.jsonl", "--samples", "4", "--length", "16"),
        0.04,
    ),
    Reader("text", ("*",), ("documents", "{}"), 0.06),
    Reader("study", ("runs.jsonl",), ("study", "{}"), 0.05),
)


@pytest.fixture(scope="module")
def one_thread() -> Any:
    """As many as the servers have: latency tables are about a machine with so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """One folder of every kind that something of ours reads."""
    root = tmp_path_factory.mktemp("pristine")
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=60))}) for _ in range(40)]
    (root / "text.jsonl").write_text("\n".join(lines))
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", *WORDS])}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    model = small_model(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    model.save_pretrained(root / "parent", max_shard_size="8KB")
    tokenizer.save_pretrained(root / "parent")
    elastic, options = root / "elastic", {"data": root / "text.jsonl"}
    pipeline.convert(root / "parent", elastic, samples=8, length=16, **options)
    config = TrainConfig(steps=2, batch_size=2, length=16, eval_every=1, checkpoint_every=1)
    pipeline.train(elastic, config, validation_windows=2, **options)
    model = from_pretrained(elastic)
    table = replace(make_table(model.elastic, base=0.1), machine=machine_of(model), adaptive=(0.1, 1.1))
    save_tables([table], elastic)
    route = RouteConfig(targets=(0.8, 1.0), evaluations=16, prefill=8, steps=4, surrogate_steps=4)
    pipeline.route(elastic, replace(route, form="search"), samples=2, length=16, **options)
    adaptive = AdaptiveConfig(targets=(0.8, 1.0), steps=2, batch=2, calibration=2, judged=2)
    pipeline.route_adaptive(elastic, adaptive, samples=8, length=16, **options)
    shutil.move(elastic / "training", root / "training")
    shutil.copy(root / "training" / "run.json", root / "training" / "run.pristine")
    model = from_pretrained(elastic)
    export(model, root / "uniform", model.elastic.smallest())
    export(model, root / "ragged", model.planner.ladder.rungs[2], layout="ragged")
    shutil.copytree(root / "ragged", root / "bare", ignore=shutil.ignore_patterns("export.json"))
    _texts(root / "text", lines)
    (root / "study").mkdir()
    (root / "study" / "runs.jsonl").write_text(
        '{"job": "convert", "seconds": 1.5, "rows": [{"loss": 2}]}\n' * 3
    )
    return root


def _texts(folder: Path, lines: list[str]) -> None:
    folder.mkdir()
    text = "\n".join(lines[:5]).encode()
    for name, data in (
        ("a.jsonl", text),
        ("b.txt", b"once upon a time"),
        ("c.jsonl.gz", gzip.compress(text)),
        ("d.txt.xz", lzma.compress(text)),
        ("e.csv", b"text,n\nhello there,1\ngood bye,2\n"),
        ("f.json", json.dumps([{"text": "hello"}, {"text": "there"}]).encode()),
    ):
        (folder / name).write_bytes(data)


class Server:
    """A worker with a copy of the folders of its own."""

    def __init__(self, pristine: Path, root: Path) -> None:
        self.root = shutil.copytree(pristine, root)
        here = Path(__file__).parent
        path = os.pathsep.join([str(here.parent), *sys.path])
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.process = subprocess.Popen([sys.executable, str(here / "server.py")], **pipes)

    def ask(self, argv: tuple[str, ...], folder: str, **more: int) -> dict[str, Any]:
        command = [part.replace("{}", str(self.root / folder)) for part in argv]
        print(json.dumps({"argv": command, **more}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def servers(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = [Server(pristine, tmp_path_factory.mktemp("worker") / "copy") for _ in range(WORKERS)]
    yield found
    for server in found:
        server.close()


def sentence(err: str) -> str | None:
    """The one sentence of a refusal, or None where there are none or more than one."""
    lines = [line for line in err.splitlines() if not _PROGRESS.fullmatch(line)]
    right = len(lines) == 1 and lines[0].startswith("flextron: ") and len(lines[0]) < 1500
    return lines[0] if right else None


def judged(server: Server, reader: Reader, rng: random.Random) -> str | None:
    """Damage a file, run the command, put the file back; what is wrong with the answer, or None."""
    folder = server.root / reader.folder
    path = rng.choice(sorted({p for pattern in reader.files for p in folder.glob(pattern)}))
    data = path.read_bytes()
    what, damaged = mutated(data, rng)
    path.write_bytes(damaged)
    before = digest(folder)
    answer = server.ask(reader.argv, reader.folder)
    after, out = digest(folder), server.root / "out"
    path.write_bytes(data)
    story = f"{reader.argv[0]} {path.name}, {what}: rc {answer['rc']}, {answer['out'][:200]!r} {answer['err'][-600:]!r}"
    written = out.exists()
    shutil.rmtree(out, ignore_errors=True)
    if after != before:
        return f"{story}: the folder was changed"
    if answer["rc"] == 2:
        told = sentence(answer["err"]) and not _NOISE.sub("", answer["out"]) and not written
        return None if told else f"{story}: must be one sentence, and nothing written"
    if answer["rc"] != 0:
        return f"{story}: must be 0 or 2"
    return f"{story}: a checksum covers it, and nothing was told" if path.name in reader.sure else None


@pytest.mark.slow
def test_a_damaged_file_is_told_in_one_sentence_or_does_no_harm(servers: list[Server]) -> None:
    def share(worker: int) -> list[str]:
        rng, faults = random.Random(worker), []
        for reader in READERS:
            for warm in (1, 0):  # what is whole is read
                answer = servers[worker].ask(reader.argv, reader.folder, warm=warm)
                shutil.rmtree(servers[worker].root / "out", ignore_errors=True)
                assert answer["rc"] == 0, (reader, answer["err"])
            for _ in range(max(1, round(reader.share * CASES / WORKERS))):
                if fault := judged(servers[worker], reader, rng):
                    faults.append(fault)
        return faults

    with ThreadPoolExecutor(WORKERS) as pool:
        faults = [fault for found in pool.map(share, range(WORKERS)) for fault in found]
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults[:20])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


def put(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def said(name: str, **values: object) -> Callable[[Path], object]:
    """A JSON file says something else."""
    return lambda folder: put(name, json.dumps(json.loads((folder / name).read_text()) | values))(folder)


def cut_short(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-10])


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


PARENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut_short, "got a truncated file"),
    "weights in git-lfs": (put("model.safetensors", LFS), "got a git-lfs pointer"),
    "tokenizer in git-lfs": (
        put("tokenizer.json", LFS),
        "tokenizer.json: must be a JSON file, got a git-lfs pointer",
    ),
    "GPTQ": (
        said("config.json", quantization_config={"quant_method": "gptq"}),
        "not quantised, got .* of gptq",
    ),
    "AWQ": (said("config.json", quantization_config={"quant_method": "awq"}), "not quantised, got .* of awq"),
    "bitsandbytes": (
        said("config.json", quantization_config={"load_in_4bit": True}),
        "must describe weights that",
    ),
    "another shape": (
        said("config.json", intermediate_size=24),
        "wrong shape model.layers.0.mlp.down_proj.weight",
    ),
    "a thousand million layers": (said("config.json", num_hidden_layers=10**9), "num_hidden_layers must be"),
    "another architecture": (
        said("config.json", model_type="bloom"),
        "model_type must be one of llama, mistral",
    ),
    "an unknown activation": (said("config.json", hidden_act="swoosh"), "must be a model that can be built"),
    "a list": (
        put("generation_config.json", "[1]"),
        "generation_config.json: must hold a JSON object, got list",
    ),
    "a hot temperature": (
        said("generation_config.json", temperature="hot"),
        "temperature must be a finite number",
    ),
    "no tokenizer": (no_tokenizer, "must hold a tokenizer"),
    "LoRA": (put("adapter_config.json", "{}"), "must hold a whole model, got an adapter"),
}


@pytest.mark.parametrize("name", PARENTS)
def test_a_parent_that_cannot_be_converted_is_told(servers: list[Server], name: str) -> None:
    change, words = PARENTS[name]
    server = servers[0]
    folder = server.root / "spoilt"
    shutil.copytree(server.root / "parent", folder)
    try:
        change(folder)
        before = digest(server.root)
        answer = server.ask(("convert", "{}", "{}/../out", "--data", "{}/../text.jsonl"), "spoilt")
        assert answer["rc"] == 2 and re.search(words, sentence(answer["err"]) or ""), answer
        assert digest(server.root) == before
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("where", ["{}/../parnt", "./parnt", "parnt", "{}/config.json"])
def test_a_mistyped_path_is_told_at_once(servers: list[Server], where: str) -> None:
    began = time.monotonic()
    answer = servers[0].ask(("convert", where, "{}/../out"), "parent")
    assert answer["rc"] == 2 and re.search("must be (a|the) directory", sentence(answer["err"]) or ""), answer
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("limit", [600, 1100, 3000, 12000])
def test_a_full_disk_is_told_and_leaves_the_old_files(servers: list[Server], limit: int) -> None:
    """No file may be longer than ``limit`` bytes: the write that a full disk would fail fails."""
    server = servers[0]
    parent = ("{}/../parent", "{}/../out", "--data", "{}/../text.jsonl", "--samples", "4", "--length", "16")
    train = ("{}", "--data", "{}/../text.jsonl", "--steps", "1", "--batch-size", "2", "--length", "16")
    for argv in (("convert", *parent), ("export", "{}", "{}/../out"), ("train", *train)):
        before = digest(server.root)
        answer = server.ask(argv, "elastic", limit=limit)
        shutil.rmtree(server.root / "elastic" / "training", ignore_errors=True)  # of a run that may go on
        assert answer["rc"] == 2 and sentence(answer["err"]), (argv, answer)
        assert digest(server.root) == before, argv
