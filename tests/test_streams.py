"""What a GPU runs without the host: no op waits for it, graphs replay with other values, any stream will do."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CASES
from test_ops import as_tuple, backward_arguments, is_floating, overload

each_op = pytest.mark.parametrize(
    "row", [row for row in CASES if "cuda" in row.devices], ids=lambda row: row.name
)
LENGTHS = (
    "extent",
    "in_extent",
    "out_extent",
    "k_start",
)  # values that may change places: each stays in its range


@pytest.fixture(autouse=True)
def a_gpu(device):
    if device == "cpu":
        pytest.skip("needs a GPU")


@contextlib.contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def calls(row, device, dtype=torch.bfloat16):
    """The op's cases, and its gradient's."""
    for case in row.inputs(device, dtype):
        yield overload(row.name), case
        if row.differentiable:
            yield overload(f"{row.name}_backward"), backward_arguments(row, case)


def assert_equal(ours, expected):
    for a, b in zip(as_tuple(ours), as_tuple(expected), strict=True):
        assert torch.equal(a, b)


@each_op
def test_no_op_waits_for_the_device(row, device):
    for op, arguments in calls(row, device):
        with no_waiting():
            op(**arguments)


@each_op
def test_a_thread_new_to_the_gpu_gives_the_same(row, device):
    """As autograd's threads are: the driver has no context there yet."""
    for op, arguments in calls(row, device):
        with ThreadPoolExecutor(1) as fresh:
            ours = fresh.submit(op, **arguments).result()
        assert_equal(ours, op(**arguments))


@each_op
def test_a_graph_replays_with_other_values(row, device):
    """Captured once; then new numbers, and the extents in another order, are written where the old ones lay."""
    for op, arguments in calls(row, device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            op(**arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = op(**arguments)
        for name, value in arguments.items():
            if is_floating(value) and name not in ("out", "lse"):
                value.copy_(torch.randn_like(value))
            elif name in LENGTHS and value is not None:
                value.copy_(value.flip(0))
        if "lse" in arguments:  # what the forward gives for the new values
            forward = {
                a.name: arguments[a.name] for a in overload(row.name)._schema.arguments if a.name in arguments
            }
            for kept, made in zip(
                (arguments["out"], arguments["lse"]), overload(row.name)(**forward), strict=True
            ):
                kept.copy_(made)
        graph.replay()
        assert_equal(captured, op(**arguments))


@each_op
def test_a_side_stream_gives_the_same(row, device):
    for op, arguments in calls(row, device):
        expected = op(**arguments)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(1_000_000)  # clock cycles: work on the wrong stream would overtake them
            late = {name: value.clone() if is_floating(value) else value for name, value in arguments.items()}
            ours = op(**late)
        side.synchronize()
        assert_equal(ours, expected)


@each_op
def test_a_device_that_is_not_the_current_one_serves(row, device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for op, arguments in calls(row, device):
        there = {n: v.to("cuda:1") if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        assert torch.cuda.current_device() == 0
        for a, b in zip(as_tuple(op(**there)), as_tuple(op(**arguments)), strict=True):
            assert a.device.index == 1 and torch.equal(a.to(device), b)
