"""Which clock times a model, and in which order: with a stand-in for a GPU's events. No promise about any time."""

import pytest
import torch
from nn.models import small_model

from flextron.artefacts.latency_table import Workload
from flextron.judge import latency, timing
from flextron.judge.latency import measure
from flextron.nn import graph, make_elastic, rooms


@pytest.fixture
def said(monkeypatch):
    """What is asked of torch.cuda, in order: events record and are waited for, and the whole device is."""
    said = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("wait for the event")

        def elapsed_time(self, end: object) -> float:
            return 2000.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait for the device"))
    return said


def test_between_two_events_there_is_nothing_but_the_runs(said):
    seconds = timing.device_clock(lambda: said.append("run"), 3)
    assert said == ["wait for the device", "record", *["run"] * 3, "record", "wait for the event"]
    assert seconds == 2.0


def test_a_gpu_is_timed_by_its_events_and_a_cpu_by_the_hosts_clock():
    assert timing.clock_of(torch.device("cuda:1")) is timing.device_clock
    assert timing.clock_of(torch.device("cpu")) is timing.wall_clock


@pytest.mark.parametrize("workload", [Workload.prefill(4), Workload.decode(4, batch=2)], ids=str)
def test_a_model_is_timed_by_its_devices_clock_in_rounds_between_runs_of_the_full_one(monkeypatch, workload):
    """The clock is chosen by where the weights are. Each sample stands between two of the full model."""
    model = make_elastic(small_model())
    config = model.elastic
    asked, seen, devices = [config.smallest(), config.uniform(0, -1)], [], []

    def clock(run, repeats):
        run()
        seen.append(model.widths)
        return {config.full(): 4.0, asked[0]: 1.0, asked[1]: 3.0}[model.widths]

    def clock_of(device):
        devices.append(device)
        return clock

    monkeypatch.setattr(latency, "clock_of", clock_of)
    found = measure(model, asked, workload, rounds=2, min_seconds=0)
    assert devices == [torch.device("cpu")] and found.full == (4000.0, 0.0)
    assert found.others == ((1000.0, 0.0), (3000.0, 0.0)) and found.noise.spread == found.noise.drift == 0
    full, small, wide = config.full(), *asked
    warm_up = [full] * 2 + [small] * 2 + [wide] * 2
    assert seen == [*warm_up, full, small, full, wide, full, full, wide, full, small, full]


def test_a_decode_step_is_timed_as_generation_takes_it_one_capture_for_all_dials(monkeypatch):
    """On a GPU: here steps count as captured, and run as Python runs them."""
    model = make_elastic(small_model())
    config, workload = model.elastic, Workload.decode(4, batch=2)
    made, seen, capture = [], [], graph.captured
    monkeypatch.setattr(rooms, "CAPTURED_ON", ("cpu",))
    monkeypatch.setattr(graph, "captured", lambda run, state: made.append(state) or capture(run, state))

    def clock(run, repeats):
        for _ in range(3):  # the context is the same at every repetition
            run()
        (state,) = made
        seen.append((state.kept.mlp[0].tolist(), state.lengths.tolist()))
        return 1.0

    def forward(*_, **__):
        raise AssertionError("modules ran")

    monkeypatch.setattr(latency, "clock_of", lambda device: clock)
    monkeypatch.setattr(model, "forward", forward)
    before = model.dial
    measure(model, [config.smallest(), config.uniform(1, 0)], workload, rounds=1, min_seconds=0)
    assert model.dial == before
    menu = config.mlp_choices
    assert {tuple(kept) for kept, _ in seen} == {(menu[0],) * 2, (menu[1],) * 2, (menu[-1],) * 2}
    assert {tuple(lengths) for _, lengths in seen} == {(4, 4)}
