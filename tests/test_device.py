"""The device that a stage runs on: the one asked for, or one sentence that says why it cannot be."""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace

import pytest
import torch

from flextron import pipeline
from flextron.cli import main
from flextron.cli.discovery import commands
from flextron.cli.parser import parser_of
from flextron.nn import placement
from flextron.nn.placement import memory_dtype, one_device

RUN_A_MODEL = ("convert", "train", "profile", "route", "tune", "eval", "generate", "export", "report")


TAKES_GPUS = placement._takes_gpus  # as it is outside of tests: see conftest.py


@pytest.fixture
def gpus(monkeypatch):
    """Lets torch and the ops seem to have so many GPUs, or why there are none."""
    monkeypatch.setattr(placement, "_takes_gpus", TAKES_GPUS)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def make(count: int = 0, built: bool = True, ops: bool = True, says: str | None = None) -> None:
        def init():
            if says:
                raise RuntimeError(says)

        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(placement, "build_info", lambda: {"cuda": ops})

    return make


def test_auto_is_the_first_gpu_and_the_cpu_where_there_is_none(gpus, monkeypatch):
    gpus(4)
    assert one_device("stage") == torch.device("cuda:0") and one_device("stage", "cpu") == torch.device("cpu")
    assert one_device("stage", "cuda") == torch.device("cuda:0")
    for given in ("cuda:2", 2, torch.device("cuda", 2), {"": "cuda:2"}, {"": 2}):
        assert one_device("stage", given) == torch.device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert one_device("stage") == one_device("stage", "cuda") == torch.device("cuda:3")
    gpus(0)
    assert one_device("stage") == one_device("stage", torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("machine", "given", "said"),
    [
        ({"built": False}, "cuda", "got cuda, but torch .* is built without CUDA"),
        ({}, "cuda:1", "got cuda:1, but no GPU is seen"),
        ({"says": "The driver is too old.\nSee"}, "cuda", "got cuda, but torch says: The driver is too old."),
        ({"count": 2, "ops": False}, "cuda", "got cuda, but flextron's ops are built without CUDA"),
        ({"count": 2}, "cuda:2", "got cuda:2, but the machine's last GPU is cuda:1"),
        ({"count": 2}, "mps", "auto or one device, such as cpu or cuda:0 .*, got 'mps'"),
        ({"count": 2}, True, "auto or one device, .*, got True"),
        ({"count": 2}, "cuda:-1", "auto or one device, .*, got 'cuda:-1'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(gpus, machine, given, said):
    gpus(**machine)
    with pytest.raises(ValueError, match=f"^stage: device must be .*{said}") as caught:
        one_device("stage", given)
    assert "\n" not in str(caught.value)


def test_under_torchrun_each_process_has_a_gpu_of_its_own(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"must be auto, cuda or cpu under torchrun, .*, got cuda:0"):
        one_device("train", "cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="one for each GPU, got local rank 2 on a machine with 2"):
        one_device("train")


def test_auto_says_why_a_gpu_is_left_alone(gpus):
    gpus(1, ops=False)
    with pytest.warns(UserWarning, match="stage: runs on the CPU, for flextron's ops are built without CUDA"):
        assert one_device("stage").type == "cpu"
    gpus(0, built=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one_device("stage").type == "cpu"


def test_weights_are_float32_on_a_cpu_and_as_stored_on_a_gpu_unless_asked_for():
    cpu, gpu, stored = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
    assert memory_dtype("load", None, stored, cpu) == torch.float32
    assert memory_dtype("load", None, stored, gpu) == stored
    assert memory_dtype("load", None, None, gpu) == torch.float32
    assert {memory_dtype("load", "auto", stored, d) for d in (cpu, gpu)} == {stored}
    assert {memory_dtype("load", "float16", stored, d) for d in (cpu, gpu)} == {torch.float16}


def test_every_command_that_runs_a_model_takes_a_device(gpus, tmp_path, capsys, monkeypatch):
    """And refuses one that is not there before it writes, or looks at, anything."""
    monkeypatch.chdir(tmp_path)
    gpus(0)
    (tmp_path / "elastic").mkdir()
    found = commands()
    for name in RUN_A_MODEL:
        more = {"convert": ["out"], "export": ["out"], "generate": ["--prompt", "x"]}.get(name, [])
        line = [name, "elastic", *more, "--device"]
        assert parser_of(found).parse_args([*line, "cpu"]).device == "cpu"
        assert main([*line, "cuda"]) == 2
        printed = capsys.readouterr()
        assert printed.err == (
            f"flextron: {name}: device must be one that can be used here, got cuda, but no GPU is seen\n"
        )
        assert main([*line, "gpu"]) == 2
        said = f"flextron: {name}: --device must be auto, cpu, cuda or cuda:N, got gpu\n"
        assert capsys.readouterr().err == said
    assert os.listdir(tmp_path) == ["elastic"] and not os.listdir(tmp_path / "elastic")


def test_a_stage_gives_its_device_to_what_it_loads(gpus, tmp_path, monkeypatch):
    gpus(2)
    monkeypatch.setattr(torch.cuda, "device", lambda device: placement.contextlib.nullcontext())
    asked = []

    class Stop(Exception):
        pass

    def model(self, dtype=torch.float32, device=None, cut=None):
        asked.append((dtype, device))
        raise Stop

    monkeypatch.setattr(pipeline.ElasticDirectory, "model", model)
    monkeypatch.setattr(pipeline.ElasticDirectory, "check_length", lambda *_: None)
    monkeypatch.setattr(pipeline.ElasticDirectory, "origin", SimpleNamespace(elastic=None), raising=False)
    for name in ("room", "cut_of"):  # they are about the model's shape
        monkeypatch.setattr(pipeline, name, lambda *_: None)
    gpu = torch.device("cuda", 1)
    for stage, given, dtype in (
        (pipeline.train, (pipeline.TrainConfig(),), torch.float32),
        (pipeline.tune, (), torch.float32),
        (pipeline.profile, ([],), None),
        (pipeline.profile_adaptive, (), None),
        (pipeline.route, (pipeline.RouteConfig(),), None),
        (pipeline.route_adaptive, (), None),
    ):
        with pytest.raises(Stop):
            stage(tmp_path, *given, device="cuda:1")
        assert asked.pop() == (dtype, gpu)
