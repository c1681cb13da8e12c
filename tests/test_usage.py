"""What the command line says of a wrong command line, and of warnings: one sentence each, in our words."""

from __future__ import annotations

import warnings

import pytest

from flextron import cli
from flextron.cli import info

WRONG = {
    "": "COMMAND must be given, got nothing",
    "convrt": "COMMAND must be one of",
    "convert a": "convert: directory must be given, got nothing",
    "convert a b --samples x": "convert: --samples must be a whole number of at least 1, got x",
    "convert a b --samples 0": "convert: --samples must be a whole number of at least 1, got 0",
    "train d --eval-every -1": "train: --eval-every must be a whole number of at least 0, got -1",
    "convert a b --mlp-choices 1,b": "convert: --mlp-choices must be whole numbers with commas between, got 1,b",
    "convert a b --unit foo": "convert: --unit must be one of",
    "convert a b --unit": "convert: --unit must be followed by a value, got none",
    "generate d --budget 1 --params 2 --prompt x": "--params must not be given with --budget, got both",
    "generate d": "generate: --prompt must be given, got nothing",
    "train d --learning-rate nan": "train: --learning-rate must be a number, got nan",
    "train d --seed 1.5": "train: --seed must be a whole number, got 1.5",
    "train d --foo": "arguments must be among those that --help lists, got --foo",
    "train d --s 3": "train: options must be written out as one of --steps, --shard, --seed, got --s",
    "train d --restart=3": "train: --restart must be given without a value, got",
    "eval d --budgets=": "eval: --budgets must be numbers with commas between, got nothing",
    "eval d --budgets 1,x": "eval: --budgets must be numbers with commas between, got 1,x",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_gives_one_sentence(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("flextron: ") and WRONG[line] in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not any(
        word in printed.err for word in ("usage:", "invalid", "argument --", "_count", "at_least", "wholes")
    )


def test_warnings_are_sentences(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: object) -> dict[str, int]:
        warnings.warn("elastic/: the table is old\n\nand more", stacklevel=2)
        return {}

    monkeypatch.setattr(info, "run", run)
    before = warnings.showwarning
    assert cli.main(["info", "elastic/"]) == 0
    assert capsys.readouterr().err == "flextron: warning: elastic/: the table is old\n"
    assert warnings.showwarning is before


def test_an_error_of_the_system_names_its_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> None:
        raise OSError(28, "No space left on device", "elastic/x.json")

    monkeypatch.setattr(info, "run", run)
    assert cli.main(["info", "elastic/"]) == 2
    assert capsys.readouterr().err == "flextron: elastic/x.json must be usable, got no space left on device\n"


def test_the_librarys_name_comes_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> None:
        raise NotImplementedError("flextron: model_type must be one of llama, got 'bloom'")

    monkeypatch.setattr(info, "run", run)
    assert cli.main(["info", "elastic/"]) == 2
    assert capsys.readouterr().err == "flextron: model_type must be one of llama, got 'bloom'\n"


def test_too_little_memory_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(info, "run", lambda args: torch.empty(2**60, dtype=torch.uint8))
    assert cli.main(["info", "elastic/"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("flextron: info: lengths, batches and models must fit into memory, got ")
    assert len(said.splitlines()) == 1

    def broken(args: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(info, "run", broken)
    with pytest.raises(RuntimeError, match="ours"):  # keeps its traceback
        cli.main(["info", "elastic/"])
