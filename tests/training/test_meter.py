"""Promises of what a run tells while it runs: rates by the formula, curves that go on where they were."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_run
import torch
from rich.console import Console

from flextron import ui
from flextron.devices import known
from flextron.training import meter, train
from flextron.training.meter import Meter, line

CPU = torch.device("cpu")


def test_operations_are_palms():
    """6 N + 12 L H Q T (PaLM, appendix B), at full width and of a smaller sub-network."""
    for tied in (True, False):
        model = tiny_run.elastic(tie_word_embeddings=tied)
        c = model.elastic
        multiplied = sum(p.numel() for n, p in model.named_parameters() if tied or "embed_tokens" not in n)
        assert c.flops(c.full(), 100) == 6 * multiplied + 12 * 2 * 4 * 8 * 100
        # a layer loses a group of two query heads, and 16 neurons
        lost = 2 * (32 * 16 * 2 + 2 * 32 * 8 + 3 * 32 * 16)
        assert c.flops(c.smallest(), 100) == 6 * (multiplied - lost) + 12 * 2 * 2 * 8 * 100


def test_utilisation_is_of_the_data_sheet_and_of_all_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 7)
    gpu, sheet = torch.device("cuda"), known("NVIDIA H100 80GB HBM3").bf16_flops
    found = Meter(gpu, True, 0.5).measured(100, sheet, 2.0, [])
    assert (found["tokens_per_s"], found["mfu"], found["peak_bytes"]) == (50.0, 0.5, 7)
    monkeypatch.setattr(meter.ranks, "now", lambda: meter.ranks.ALONE._replace(size=4))
    assert Meter(gpu, True, 0.5).measured(100, sheet, 2.0, [])["mfu"] == 0.125
    assert "mfu" not in Meter(gpu, False, 0.5).measured(100, sheet, 2.0, [])  # the sheet is of bfloat16
    assert "mfu" not in Meter(gpu, True, 0.5).measured(100, float("nan"), 2.0, [])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU that nobody knows")
    assert "mfu" not in Meter(gpu, True, 0.5).measured(100, sheet, 2.0, [])


def test_losses_are_averaged_by_size_and_go_on_after_a_resume():
    whole = Meter(CPU, True, 0.2)
    steps = [[(0.2, 5.0), (1.0, 1.0)], [(0.41, 4.0)], [(0.4, 3.0), (1.0, 2.0)]]
    found = [whole.measured(1, 1.0, 1.0, seen)["loss_by_size"] for seen in steps]
    assert found[0] == {"0.40": 5.0, "1.00": 1.0}
    assert found[1] == {"0.40": 5.0, "0.60": 4.0, "1.00": 1.0}
    assert found[2] == pytest.approx({"0.40": 4.8, "0.60": 4.0, "1.00": 1.1})
    resumed = Meter(CPU, True, 0.2, [{"loss_by_size": f} for f in found[:2]] + [{"sub_networks": []}])
    assert resumed.measured(1, 1.0, 1.0, steps[2])["loss_by_size"] == found[2]
    assert list(found[2]) == sorted(found[2])
    assert Meter(CPU, True, 1.0).measured(1, 1.0, 1.0, [(1.0, 2.0)])["loss_by_size"] == {"1.00": 2.0}


def test_a_line_says_it_in_a_few_words():
    record = {"loss": 3.2142, "tokens_per_s": 5312.0, "mfu": 0.412, "peak_bytes": 12.34e9}
    assert line(record) == "loss 3.214, 5.3k tokens/s, MFU 41 %, 12.3 GB"
    del record["mfu"]
    assert line(record | {"tokens_per_s": 123456.0}) == "loss 3.214, 123k tokens/s, 12.3 GB"


def test_without_a_terminal_a_line_has_the_note_and_the_time_left(monkeypatch):
    lines: list[str] = []
    now = iter((0.0, 20.0, 30.0))
    monkeypatch.setattr(ui.console, "print", lambda text, **_: lines.append(text))
    monkeypatch.setattr(ui.time, "monotonic", lambda: next(now))
    told = ui.Reporter(None)
    for done in (1, 11, 100):
        told.note(f"loss {done}")
        told("training", done, 100)
    assert lines == [
        "training 1/100, loss 1",
        "training 11/100, loss 11, 0:02:58 left",
        "training 100/100, loss 100",
    ]


def test_on_a_terminal_of_eighty_columns_bar_and_note_are_shown_whole(monkeypatch):
    shown = StringIO()
    monkeypatch.setattr(ui, "console", Console(file=shown, force_terminal=True, width=80))
    note = "loss 3.214, 5.3k tokens/s, MFU 41 %, 12.3 GB"
    with ui.reporter() as told:
        told.note(note)
        told("elastic training", 1, 3)
    assert note in shown.getvalue() and "elastic training" in shown.getvalue()
    assert "…" not in shown.getvalue()


CURVES: dict[str, dict[str, dict[int, float]]] = {}


class Writer:
    """Stands in for tensorboard's; keeps what a viewer would show of a folder."""

    def __init__(self, log_dir: str, purge_step: int) -> None:
        if not Path(log_dir).exists():
            CURVES[log_dir] = {}
        self.shown = CURVES[log_dir]
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        for curve in self.shown.values():
            for step in [s for s in curve if s >= purge_step]:
                del curve[step]

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert step not in self.shown.setdefault(tag, {})
        self.shown[tag][step] = value

    def flush(self) -> None: ...
    def close(self) -> None: ...


def curves(directory: Path) -> dict[str, dict[int, float]]:
    found = CURVES[str(directory / "tensorboard")]
    return {
        tag: curve for tag, curve in found.items() if tag not in ("train/tokens_per_s", "train/peak_bytes")
    }


def test_curves_of_a_resumed_run_are_those_of_a_whole_one(tmp_path, monkeypatch):
    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    config = replace(tiny_run.CONFIG, steps=5, distillation=0.0, eval_every=2, checkpoint_every=2)
    data = {"tokens": tiny_run.tokens(), "validation": tiny_run.tokens(48).view(4, 12)}

    def run(name: str, progress: Any = None, **options: Any) -> None:
        model, directory = tiny_run.elastic(), tmp_path / name
        train(model, config=config, directory=directory, progress=progress, **data, **options)

    def kill(step: int, *_: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", kill)
    run("killed")
    whole = curves(tmp_path / "whole")
    assert whole == curves(tmp_path / "killed")
    records = [json.loads(row) for row in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert whole["train/loss"] == {r["step"]: r["loss"] for r in records if "loss" in r}
    held_out = {tag for tag in whole if tag.startswith("held_out/")}
    assert len(held_out) == 3 and all(list(whole[tag]) == [0, 2, 4, 5] for tag in held_out)
    assert any(tag.startswith("loss_by_size/") for tag in whole)
    run("killed", resume=False)
    assert whole == curves(tmp_path / "killed")


def test_what_is_written_is_what_tensorboard_reads(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from flextron.training.tensorboard import FOLDER, Board

    for resumed, last in ((0, 3), (2, 4)):
        board = Board(tmp_path, resumed)
        for step in range(resumed + 1, last + 1):
            board.write({"step": step, "loss": float(10 * resumed + step), "tokens": 1, "seconds": 1.0})
        board.close()
    found = accumulator.EventAccumulator(str(tmp_path / FOLDER)).Reload()
    assert found.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]
