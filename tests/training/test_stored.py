"""What training leaves is in the checkpoint's own dtypes; its own folder loses nothing."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nn.models import small_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from flextron import pipeline
from flextron.artefacts.directory import load_elastic
from flextron.artefacts.elastic_model import save_elastic
from flextron.artefacts.latency_table import Workload
from flextron.checkpoint import load_tensors, read_json, stored_dtypes
from flextron.config import Widths
from flextron.conversion import convert
from flextron.corpus import Corpus, held_out_windows
from flextron.judge.loss import evaluate
from flextron.recipes import TrainConfig, TuneConfig
from flextron.training import resume

OPTIONS = {"batch_size": 2, "length": 16, "eval_every": 2, "checkpoint_every": 2, "learning_rate": 1e-3}
NAMES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def corpus() -> Corpus:
    draw = torch.Generator().manual_seed(5)
    return Corpus(*(torch.randint(0, 61, (n,), generator=draw) for n in (800, 200)))


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted parent of bfloat16 matrices and float32 norms."""
    parent = small_model()
    for p in parent.parameters():
        p.data = p.data if p.dim() < 2 else p.data.bfloat16()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    out = tmp_path_factory.mktemp("elastic")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2")
    convert(parent, out, calibration=corpus().train.view(-1, 16), tokenizer=tokenizer)
    return out


@pytest.fixture
def checkpoint(halves: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halves, tmp_path / "elastic"))


def dtypes(directory: Path) -> dict[str, torch.dtype]:
    return {name: NAMES[found] for name, found in stored_dtypes(directory / "model.safetensors").items()}


def train(directory: Path, steps: int, bf16: bool = False, **options: Any) -> Any:
    config = TrainConfig(steps=steps, distillation=1.0, bf16=bf16, **OPTIONS)
    return pipeline.train(directory, config, data=corpus(), **options)


def masters(directory: Path, step: int) -> dict[str, torch.Tensor]:
    files = (directory / "training" / f"step-{step:08d}").glob("*.safetensors")
    tensors = {name: value for file in files for name, value in load_tensors(file).items()}
    return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}


def losses(directory: Path, rows: list[dict[str, Any]]) -> list[float]:
    model, _ = load_elastic(directory)
    windows = held_out_windows(None, corpus(), 8, 16)
    return evaluate(model, windows, [Widths(row["mlp"], row["heads"]) for row in rows], 2)


def test_a_checkpoint_keeps_its_dtypes_and_its_size(checkpoint: Path) -> None:
    size, before = (checkpoint / "model.safetensors").stat().st_size, dtypes(checkpoint)
    assert set(before.values()) == {torch.bfloat16, torch.float32}
    report = train(checkpoint, 4)
    assert dtypes(checkpoint) == before and (checkpoint / "model.safetensors").stat().st_size == size
    assert read_json(checkpoint / "flextron.json")["dtypes"] == {"bfloat16": 22, "float32": 7}
    model, _ = load_elastic(checkpoint)
    trained, changed = masters(checkpoint, 4), 0
    for name, p in model.named_parameters():
        assert trained[name].dtype == torch.float32
        assert torch.equal(p, trained[name].to(before[name]).float())
        changed += not torch.equal(p, trained[name])
    assert changed  # the masters have what the checkpoint rounds off
    # and what is said of the result is said of what lies there
    last, stored = report.evaluations[-2:]
    assert (last["step"], stored["step"], stored["stored"]) == (4, 4, True)
    found = [row["loss"] for row in stored["sub_networks"]]
    assert found == losses(checkpoint, stored["sub_networks"]) != [r["loss"] for r in last["sub_networks"]]


def test_more_steps_go_on_from_weights_that_were_never_rounded(halves: Path, tmp_path: Path) -> None:
    """The file rounds; the run that is taken up again does not see it."""
    stopped, whole = (Path(shutil.copytree(halves, tmp_path / name)) for name in ("stopped", "whole"))

    def killed(_: str, step: int, steps: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    train(whole, 4)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, 4, progress=killed)
    for dtype in ("auto", "float32", "auto"):  # and again, once finished and rounded
        report = train(stopped, 4, dtype=dtype)
        assert all(torch.equal(v, masters(whole, 4)[k]) for k, v in masters(stopped, 4).items())
    assert report.resumed_from == 4
    assert train(stopped, 6).resumed_from == 4
    assert read_json(stopped / "training" / resume.RUN_FILE)["extended"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_can_be_chosen(checkpoint: Path, dtype: str) -> None:
    train(checkpoint, 2, dtype=dtype)
    assert set(dtypes(checkpoint).values()) == {getattr(torch, dtype)}
    assert AutoModelForCausalLM.from_pretrained(checkpoint).dtype == getattr(torch, dtype)
    again = train(checkpoint, 2)  # and stays
    assert again.resumed_from == 2 and set(dtypes(checkpoint).values()) == {getattr(torch, dtype)}
    with pytest.raises(ValueError, match=r"train: dtype must be one of auto, .*, got 'int8'"):
        train(checkpoint, 2, dtype="int8")


@pytest.mark.parametrize("began, later", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_teacher_is_held_as_it_was_when_its_run_began(
    checkpoint: Path, began: str, later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dtype that the checkpoint was stored in, whatever it is stored in by now: its last bits depend on it.

    A run that does not say it, as those of earlier versions, held it in float32.
    """
    save_elastic(load_elastic(checkpoint)[0], checkpoint, dtype=began)
    held = []

    def seen(*args: Any, teacher: Any, **options: Any) -> Any:
        held.append({p.dtype for p in teacher.parameters()})
        return train_model(*args, teacher=teacher, **options)

    train_model = pipeline.train_model
    monkeypatch.setattr(pipeline, "train_model", seen)
    train(checkpoint, 2, dtype=later)
    assert set(dtypes(checkpoint).values()) == {getattr(torch, later)}
    assert train(checkpoint, 4).resumed_from == 2
    assert held == 2 * [{getattr(torch, began)}]
    said = read_json(checkpoint / "training" / resume.RUN_FILE)["teacher"].get("held")
    assert said == ("bfloat16" if began == "bfloat16" else None)
    train(checkpoint, 2, restart=True)
    assert held[2] == {getattr(torch, later)}
    train(checkpoint, 2, bf16=True, restart=True)  # a CPU then multiplies in bfloat16
    assert held[3] == {torch.bfloat16}


def test_what_tuning_reads_off_a_router_is_of_the_weights_as_stored(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the router and for its training: what is measured afterwards must be of what lies there."""
    model, _ = load_elastic(checkpoint)
    table = SimpleNamespace(full_ms=1.0, costs="these", workload=Workload.prefill(8))
    ladder = SimpleNamespace(origin="router")
    planner = SimpleNamespace(ladder=ladder, table=lambda _: table, tables=(table,), here=(table,))
    model.planner = SimpleNamespace(at=lambda *_: planner, ladder=ladder)
    found = SimpleNamespace(
        phase="prefill",
        costs="these",
        router=torch.nn.Identity(),
        ladder=ladder,
        config=SimpleNamespace(form="gumbel"),  # which is judged by the loss
        write=lambda stage, origin: None,
    )
    said = []

    def moved(model: Any, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.001)

    def refreshed(found: Any, elastic: Any, table: Any, loss: Any) -> Any:
        said.append(loss(elastic.full()))
        return found

    there = SimpleNamespace(
        origin=SimpleNamespace(elastic=model.elastic),
        check_length=lambda *_: None,
        equipped=lambda **_: model,
        static=lambda: found,
    )
    monkeypatch.setattr(pipeline, "ElasticDirectory", SimpleNamespace(open=lambda _: nullcontext(there)))
    monkeypatch.setattr(pipeline, "tune_model", moved)
    monkeypatch.setattr(pipeline.static_routing, "refreshed", refreshed)
    pipeline.tune(checkpoint, TuneConfig(length=16), data=corpus(), samples=4)
    windows = held_out_windows(None, Corpus(corpus().train, corpus().train), 4, 16)
    stored, _ = load_elastic(checkpoint)
    assert said == evaluate(stored, windows, [stored.elastic.full()])


def test_another_models_weights_are_still_refused(checkpoint: Path) -> None:
    train(checkpoint, 2)
    model, _ = load_elastic(checkpoint)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    save_elastic(model, checkpoint)
    with pytest.raises(ValueError, match="must be resumed with the weights it started from or saved"):
        train(checkpoint, 2)
