"""The benchmarks time every op, and what they compare computes the same."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from flextron_ext import schemas

PATH = Path(__file__).resolve().parents[1] / "python" / "benchmarks" / "bench_ops.py"
SPEC = importlib.util.spec_from_file_location("bench_ops", PATH)
bench_ops = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = bench_ops  # dataclasses look their module up
SPEC.loader.exec_module(bench_ops)


def test_every_op_has_its_benchmark():
    ops = {schema.split("(")[0].removeprefix("flextron::") for schema in schemas()}
    assert set(bench_ops.BENCHES) == {op for op in ops if not op.endswith("_backward")}


@pytest.mark.parametrize("op", bench_ops.BENCHES)
def test_both_sides_of_a_benchmark_agree(op):
    for case in bench_ops.BENCHES[op]():
        torch.testing.assert_close(case.ours(), case.plain(), rtol=1e-3, atol=1e-4)
        assert case.flops > 0
