"""The directory of an elastic checkpoint is opened once by a command, and inference imports no trainer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nn.models import small_model
from routing.synthetic import make_table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import flextron
from flextron import pipeline
from flextron.artefacts import machine
from flextron.artefacts.elastic_model import save_elastic
from flextron.artefacts.latency_files import save_tables
from flextron.artefacts.machine import machine_of, name_of
from flextron.checkpoint import recover
from flextron.cli import main
from flextron.corpus import Corpus
from flextron.nn import elastic_config, make_elastic

TEXT = Corpus(torch.arange(40 * 16) % 61, torch.arange(8 * 16) % 61)
ROUTE = flextron.RouteConfig(targets=(0.8, 1.0), evaluations=16, prefill=8, steps=4, surrogate_steps=4)
ADAPTIVE = flextron.AdaptiveConfig(targets=(0.8, 1.0), steps=1, batch=2, calibration=2, judged=2)
SHORT = {"samples": 8, "length": 16, "data": TEXT}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An elastic checkpoint with tables, both routers and a tokenizer."""
    directory = tmp_path_factory.mktemp("pristine") / "elastic"
    model = small_model(eos_token_id=2)
    make_elastic(model, elastic_config(model))
    vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="w2", pad_token="w2")
    save_elastic(model, directory, tokenizer)
    table = make_table(model.elastic, base=0.1)
    save_tables([replace(table, machine=machine_of(model), adaptive=(0.1, 1.1))], directory)
    pipeline.route(directory, ROUTE, **SHORT)
    pipeline.route_adaptive(directory, ADAPTIVE, **SHORT)
    return directory


@pytest.fixture
def elastic(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "elastic"))


@pytest.fixture
def recovered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions that recover a directory, but for `commit`, which puts its own files in place."""
    real, callers = recover, []

    def watched(directory: str | Path) -> None:
        callers.append(sys._getframe(1).f_code.co_name)
        real(directory)

    for module in list(sys.modules.values()):
        if getattr(module, "recover", None) is real:
            monkeypatch.setattr(module, "recover", watched)
    return callers


def command(*argv: Any) -> Callable[[Path], Any]:
    return lambda directory: main([argv[0], str(directory), *map(str, argv[1:]), "--json"])


@pytest.mark.parametrize(
    ("fast", "form", "dtype", "compared"),
    [
        (True, "surrogate", None, torch.bfloat16),
        (True, "surrogate", "float32", torch.float32),
        (True, "gumbel", None, torch.float32),
        (False, "surrogate", None, torch.float32),
    ],
)
def test_networks_are_compared_in_bfloat16_where_that_is_fast(
    elastic, monkeypatch, fast, form, dtype, compared
):
    judge, seen = pipeline._judge, []
    monkeypatch.setattr(pipeline, "bf16_is_fast", lambda device: fast)
    monkeypatch.setattr(
        pipeline, "_judge", lambda model, *rest: seen.append(model.dtype) or judge(model, *rest)
    )
    pipeline.route(elastic, replace(ROUTE, form=form), dtype=dtype, **SHORT)
    assert seen == [compared]


COMMANDS: dict[str, Callable[[Path], Any]] = {
    "from_pretrained": flextron.from_pretrained,
    "info": command("info"),
    "generate": command("generate", "--prompt", "w3 w4", "--max-new-tokens", 2, "--budget", 0.9),
    "profile": lambda d: pipeline.profile(
        d, [flextron.Workload.prefill(4)], rounds=1, min_seconds=0.0, fit=2, held_out=1, patience=0
    ),
    "profile_adaptive": lambda d: pipeline.profile_adaptive(d, rounds=1, min_seconds=0.0),
    "train": lambda d: pipeline.train(
        d, flextron.TrainConfig(steps=1, batch_size=2, length=16, distillation=1.0), data=TEXT
    ),
    "route": lambda d: pipeline.route(d, ROUTE, **SHORT),
    "route_adaptive": lambda d: pipeline.route_adaptive(d, ADAPTIVE, **SHORT),
    "tune": lambda d: pipeline.tune(
        d, flextron.TuneConfig(steps=1, batch_size=2, length=16, distillation=1.0), data=TEXT, samples=4
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_recovers_its_directory_once(
    name: str, elastic: Path, recovered: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    COMMANDS[name](elastic)
    assert [caller for caller in recovered if caller != "commit"] == ["_at_one_moment"]


def test_evaluation_recovers_the_directory_once(
    elastic: Path, recovered: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("w3 w4 w5 w6 " * 200)
    options = ("--budgets", 0.9, "--adaptive", "--samples", 2, "--length", 8, "--rounds", 1)
    assert command("eval", "--data", tmp_path / "text.txt", *options)(elastic) == 0
    assert recovered == ["_at_one_moment"]


def test_what_was_left_for_other_weights_is_dropped_by_training(elastic: Path) -> None:
    before = flextron.from_pretrained(elastic)
    assert before.adaptive is not None and before.planner.ladder.origin == "router"
    pipeline.train(elastic, flextron.TrainConfig(steps=1, batch_size=2, length=16), data=TEXT)
    names = {path.name for path in elastic.iterdir()}
    assert "latency" in names and not names & {"routers.json", "adaptive.json"}


def test_a_checkpoint_on_another_machine_says_what_it_knows_and_learns_this_one(
    elastic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (known,) = (elastic / "latency").iterdir()
    before = known.read_bytes()
    monkeypatch.setattr(machine, "_cpu", lambda: ("Other CPU", ()))
    here = name_of(machine.machine_on(torch.device("cpu"), torch.float32))
    with pytest.warns(UserWarning) as said:
        model = flextron.from_pretrained(elastic)
    assert [str(one.message) for one in said] == [
        f"{elastic}: has latency tables of {known.stem} only, none of {here}; run `flextron profile {elastic}`"
    ]
    assert model.set_budget(params=1e9) == model.elastic.full()
    with pytest.raises(
        ValueError, match=rf"table of this machine \({here}\), got those of {known.stem} only; run"
    ):
        model.set_budget(0.9)
    elsewhere = model.set_budget(0.9, machine=known.stem)
    pipeline.profile(
        elastic, [flextron.Workload.prefill(4)], rounds=1, min_seconds=0.0, fit=2, held_out=1, patience=0
    )
    assert known.read_bytes() == before and {p.stem for p in known.parent.iterdir()} == {known.stem, here}
    with pytest.warns(UserWarning, match="the adaptive router is calibrated for other latency tables"):
        model = flextron.from_pretrained(elastic)
    assert [table.machine_name for table in model.planner.here] == [here]
    assert model.planner.ladder.origin == "router"  # its networks are the same everywhere
    assert model.set_budget(0.9, machine=known.stem) == elsewhere


_INFERENCE = """
import sys
import flextron
model = flextron.from_pretrained({directory!r})
model.set_budget(0.9)
import torch
model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False)
model.set_budget(0.9, adaptive=True)
model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False)
from flextron.cli import main
text = ["--prompt", "w3 w4", "--max-new-tokens", "2", "--json"]
assert main(["generate", {directory!r}, *text, "--budget", "0.9"]) == 0
assert main(["info", {directory!r}, "--json"]) == 0
rooms = ("flextron.training", "flextron.routing", "flextron.conversion", "flextron.tuning", "flextron.pipeline")
print("rooms:", sorted(name for name in sys.modules if name.startswith(rooms)))
"""


def test_inference_imports_no_trainer(pristine: Path) -> None:
    code = _INFERENCE.format(directory=str(pristine))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "rooms: []"
