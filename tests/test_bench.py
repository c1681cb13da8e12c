"""The benchmarks time every op, what they compare computes the same, and what they write can be read."""

import argparse
import csv

import pytest
import torch
from scripts import load_script

from flextron_ext import schemas

bench_ops = load_script("benchmarks/bench_ops.py")
COLUMNS = (
    "op,device,arch,dtype,shape,tokens,extent,time_us,rate,rate_unit,ceiling,"
    "rival,rival_time_us,ratio,spread,commit"
)


def arguments(*more: str) -> argparse.Namespace:
    small = ["--shapes", "tiny", "--tokens", "5", "--rounds", "3", "--seconds", "0", "--no-wait"]
    return bench_ops.parse([*small, *more])


def target(args: argparse.Namespace) -> "bench_ops.Target":
    return bench_ops.Target(args.device, bench_ops.DTYPES[args.dtype or "float32"], args.backward)


@pytest.fixture
def small_ceilings(monkeypatch):
    monkeypatch.setattr(bench_ops, "ceilings", lambda *_: bench_ops.Ceilings(1e9, 1e9))


def test_every_op_has_its_benchmark():
    ops = {schema.split("(")[0].removeprefix("flextron::") for schema in schemas()}
    timed_with_gradients = {op for op in ops if op.endswith(("_backward", "_with_hidden"))}
    around_a_step = {"decoder_hold", "decoder_drop"}
    assert set(bench_ops.BENCHES) == ops - timed_with_gradients - around_a_step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", bench_ops.BENCHES)
def test_all_sides_of_a_benchmark_agree(op, dtype):
    args = arguments("--op", op, "--dtype", dtype)
    for _, case in bench_ops.cases(args, target(args)):
        with torch.no_grad():
            bench_ops.verify(case, target(args))
        assert case.flops > 0 and case.bytes > 0


@pytest.mark.parametrize("op", bench_ops.DIFFERENTIABLE)
def test_all_gradients_of_a_benchmark_agree(op):
    args = arguments("--op", op, "--backward")
    for _, case in bench_ops.cases(args, target(args)):
        bench_ops.verify(case, target(args))


def test_a_wrong_rival_is_found():
    args = arguments("--op", "elastic_mlp")
    _, case = next(iter(bench_ops.cases(args, target(args))))
    case.rivals["concatenated"] = lambda i: i.x
    with pytest.raises(AssertionError, match="concatenated must be right"), torch.no_grad():
        bench_ops.verify(case, target(args))


def test_the_figures_are_written_and_drawn(tmp_path, small_ceilings, capsys):
    pytest.importorskip("matplotlib")
    table, drawing = tmp_path / "a" / "ops.csv", tmp_path / "ops.png"
    rows = bench_ops.run(arguments("--op", "elastic_mlp,route", "--csv", str(table)))
    assert "elastic_mlp" in capsys.readouterr().out
    with table.open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows)
    assert set(COLUMNS.split(",")) <= written[0].keys()
    assert {row["extent"] for row in written if row["op"] == "elastic_mlp"} == {
        "1",
        "0.75",
        "0.5",
        "0.25",
        "mix",
    }
    for row in written:
        assert float(row["ratio"]) == pytest.approx(
            float(row["rival_time_us"]) / float(row["time_us"]), rel=1e-4
        )
    bench_ops.plot(written, drawing)
    assert drawing.stat().st_size > 0


def test_bad_arguments_are_one_sentence(capsys):
    for bad, message in (
        (["--op", "flash"], "must be one of elastic_linear"),
        (["--shapes", "gpt5"], "must be one of smollm2"),
        (["--rounds", "1"], "--rounds must be at least 3, got 1"),
        (["--read", "x.csv"], "--plot must be given with --read"),
    ):
        with pytest.raises(SystemExit, match="2"):
            bench_ops.parse(bad)
        assert message in capsys.readouterr().err
