"""Latency tables of several machines in one checkpoint: each in a file of its own, and the right one chosen."""

import json
from dataclasses import replace

import pytest
import torch
from routing.synthetic import make_config, make_table, measured

from flextron.artefacts import machine
from flextron.artefacts.latency_files import (
    OLD_FILE,
    by_phase,
    kept_tables,
    load_tables,
    machines,
    nearest,
    of_machine,
    save_tables,
)
from flextron.artefacts.latency_table import Workload
from flextron.artefacts.machine import machine_on, name_of
from flextron.artefacts.planner import Planner
from flextron.checkpoint import CheckpointError
from flextron.routing.fit import fit_table

CONFIG = make_config()
VERSIONS = {"torch": "2.13.0", "flextron": "0.1.0"}
CPU = {"device": "AMD EPYC", "instructions": "AVX2", "threads": 2, "dtype": "float32"} | VERSIONS
GPU = {"device": "NVIDIA H200", "dtype": "bfloat16"} | VERSIONS
PREFILL = replace(make_table(CONFIG), machine=CPU)
DECODE = replace(make_table(CONFIG, "decode", base=0.5), machine=CPU)
ON_GPU = replace(PREFILL, machine=GPU, base=0.2, slope=0.1)
PAPER = f"latency/{PREFILL.machine_name}.json"


def decoding(*batches, context=64):
    return [replace(DECODE, workload=Workload.decode(context, batch), base=float(batch)) for batch in batches]


def old_file(directory, *tables):
    """What older versions wrote: one file, a table for each phase, of a machine with fewer facts."""
    directory.mkdir(exist_ok=True)
    tables = {table.workload.phase: table.to_dict() for table in tables}
    (directory / OLD_FILE).write_text(json.dumps({"format": 1, "tables": tables}))


def test_tables_survive_the_files_of_their_machines(tmp_path):
    table = fit_table(PREFILL, *measured(PREFILL, 0.02))
    save_tables([*decoding(8, 1), table, ON_GPU], tmp_path)
    assert load_tables(tmp_path, CONFIG) == (table, *decoding(1, 8), ON_GPU)
    names = ["amd-epyc-avx2-2-threads-float32", "nvidia-h200-bfloat16"]
    assert machines(load_tables(tmp_path, CONFIG)) == names
    assert sorted(path.name for path in (tmp_path / "latency").iterdir()) == [
        f"{name}.json" for name in names
    ]
    stored = json.loads((tmp_path / PAPER).read_text())["tables"][0]
    assert stored["residual_median"] == table.residual_median


def test_storing_leaves_the_files_of_other_machines_alone(tmp_path):
    save_tables([ON_GPU], tmp_path)
    other = tmp_path / "latency" / "nvidia-h200-bfloat16.json"
    before = other.stat().st_ino, other.read_bytes()
    save_tables([PREFILL], tmp_path)
    assert (other.stat().st_ino, other.read_bytes()) == before
    assert load_tables(tmp_path, CONFIG) == (PREFILL, ON_GPU)


def test_a_directory_that_was_never_profiled_has_no_tables(tmp_path):
    assert load_tables(tmp_path, CONFIG) == ()


@pytest.mark.parametrize("name", [PAPER, OLD_FILE])
@pytest.mark.parametrize(
    "content",
    [
        '{"format": 1, "tables": [{"elastic": {}}]}',
        '{"format": 1, "tables": {"prefill": {"elastic": {}}}}',
        '{"format": 1, "tables": {"prefill": 3}}',
        '{"format": 1}',
        '{"format": 2}',
        "[]",
    ],
)
def test_a_foreign_file_is_refused_in_one_sentence(tmp_path, name, content):
    (tmp_path / "latency").mkdir()
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name}: "):
        load_tables(tmp_path, CONFIG)
    assert kept_tables(tmp_path, CONFIG, CPU) == ()  # the next profile replaces it


def test_a_file_under_another_machines_name_is_refused(tmp_path):
    save_tables([PREFILL], tmp_path)
    (tmp_path / PAPER).rename(tmp_path / "latency" / "mine.json")
    with pytest.raises(CheckpointError, match=r"must be of the machine mine, got amd-epyc-avx2-2-threads"):
        load_tables(tmp_path, CONFIG)


def test_a_table_of_another_model_is_refused_and_says_whose(tmp_path):
    """The menus are the same: what differs is a size that no menu shows, and that a latency depends on."""
    save_tables([PREFILL], tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_tables(tmp_path, replace(CONFIG, hidden_size=64, vocab_size=120))
    assert str(caught.value) == (
        f"{tmp_path}/{PAPER}: must be made for the model here, got one of hidden_size 32 instead of 64, vocab_size 100 "
        f"instead of 120; run `flextron profile {tmp_path}` on that machine, or remove the file"
    )


def test_a_table_of_an_unknown_model_is_left_out_and_named(tmp_path):
    """What versions wrote that did not say which model a table is of."""
    old_file(tmp_path, PREFILL, DECODE)
    content = json.loads((tmp_path / OLD_FILE).read_text())
    del content["tables"]["decode"]["elastic"]
    (tmp_path / OLD_FILE).write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"latency\.json: a table does not say .* run `flextron profile"):
        assert load_tables(tmp_path, CONFIG) == (PREFILL,)


def test_the_file_of_older_versions_is_read_and_goes_with_the_next_profile(tmp_path):
    older = {fact: value for fact, value in CPU.items() if fact != "instructions"}
    old_file(tmp_path, replace(PREFILL, machine=older), replace(DECODE, machine=older))
    found = load_tables(tmp_path, CONFIG)
    assert of_machine(found, CPU) == (PREFILL, DECODE)  # it is this machine, which is now known better
    new = replace(DECODE, base=9.0)
    save_tables((*kept_tables(tmp_path, CONFIG, CPU), new), tmp_path)
    assert load_tables(tmp_path, CONFIG) == (PREFILL, new)
    assert [path.name for path in tmp_path.iterdir()] == ["latency"]


def test_what_an_older_file_says_of_another_machine_is_kept(tmp_path):
    old_file(tmp_path, ON_GPU)
    save_tables((*kept_tables(tmp_path, CONFIG, CPU), PREFILL), tmp_path)
    assert load_tables(tmp_path, CONFIG) == (PREFILL, ON_GPU) and not (tmp_path / OLD_FILE).exists()


def test_the_tables_of_a_machine_are_found_by_what_makes_it():
    tables = (PREFILL, DECODE, ON_GPU)
    assert of_machine(tables, CPU | {"torch": "3.0"}) == (PREFILL, DECODE)
    assert of_machine(tables, "nvidia-h200-bfloat16") == (ON_GPU,)
    for fact, value in (("device", "AMD Ryzen"), ("instructions", "AVX-512")):
        assert of_machine(tables, CPU | {fact: value}) == ()


def test_a_use_of_a_device_that_was_not_profiled_is_answered_by_the_only_one_that_was():
    tables, wide = (PREFILL, DECODE, ON_GPU), replace(PREFILL, machine=CPU | {"threads": 8})
    for fact, value in (("threads", 4), ("dtype", "bfloat16")):
        other = CPU | {fact: value}
        assert of_machine(tables, other) == (PREFILL, DECODE)
        assert of_machine((*tables, wide), other) == ()
    assert of_machine((*tables, wide), CPU | {"threads": 8}) == (wide,)
    half = replace(ON_GPU, machine=GPU | {"dtype": "float16"})
    assert of_machine([ON_GPU], GPU | {"dtype": "float32"}) == (ON_GPU,)
    assert of_machine([ON_GPU, half], GPU) == (ON_GPU,)
    assert of_machine([ON_GPU, half], GPU | {"dtype": "float32"}) == ()
    assert ON_GPU.differs(GPU | {"dtype": "float32"}) == [
        "the prefill table was measured with dtype 'bfloat16', now it is 'float32'"
    ]


def test_a_phase_alone_means_its_smallest_workload():
    tables = (*decoding(64, 8), *decoding(8, context=512), PREFILL)
    assert by_phase(tables) == {"prefill": PREFILL, "decode": decoding(8)[0]}
    assert nearest(decoding(8, 64), None, None) == decoding(8)[0]


@pytest.mark.parametrize(
    ("asked", "chosen"), [(1, 1), (2, 1), (3, 8), (8, 8), (20, 8), (30, 64), (64, 64), (128, 64)]
)
def test_a_batch_means_the_nearest_profiled_by_ratio(asked, chosen):
    assert nearest(decoding(1, 8, 64), asked, None).workload.batch == chosen


def test_a_context_chooses_among_those_of_the_batch():
    tables = [*decoding(1, 8), *decoding(8, context=512)]
    assert nearest(tables, 8, 400).workload == Workload.decode(512, 8)
    with pytest.raises(ValueError, match="context must be near 64, as in the decode latency tables, got 400"):
        nearest(tables, 1, 400)


@pytest.mark.parametrize("asked", [3, 129])
def test_a_batch_far_outside_of_the_profiled_is_refused(asked):
    with pytest.raises(
        ValueError, match=f"batch must be near 8, 64, as in the decode .* got {asked}; profile"
    ):
        nearest(decoding(8, 64), asked, None)


def test_budgets_are_of_the_machine_that_the_model_is_on(monkeypatch):
    """A stand-in for a GPU: the facts come from torch.cuda, and the threads of the host are none of them."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H{200 + device.index}")
    monkeypatch.setattr(machine, "_cpu", lambda: ("AMD EPYC", ("AVX2",)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    planner = Planner(CONFIG, (PREFILL, DECODE, ON_GPU))
    on_cpu = planner.at(torch.device("cpu"), torch.float32)
    on_gpu = planner.at(torch.device("cuda:0"), torch.bfloat16)
    assert on_cpu.table("prefill") == PREFILL and on_gpu.table("prefill") == ON_GPU
    assert on_cpu.resolve(0.6) == Planner(CONFIG, [PREFILL]).resolve(0.6)
    assert on_gpu.resolve(0.6) == on_cpu.resolve(0.6, machine="nvidia-h200-bfloat16") != on_cpu.resolve(0.6)
    assert on_gpu.target(latency_ms=ON_GPU.full_ms / 2) == pytest.approx(0.5)
    elsewhere = planner.at(torch.device("cuda:1"), torch.bfloat16)
    assert "threads" not in elsewhere.machine
    names = "amd-epyc-avx2-2-threads-float32, nvidia-h200-bfloat16"
    for ask in ({"fraction": 0.6}, {"latency_ms": 3.0}, {"tokens_per_s": 3.0}):
        with pytest.raises(
            ValueError,
            match=rf"table of this machine \(nvidia-h201-bfloat16\), got those of {names} only; run `flextron profile",
        ):
            elsewhere.resolve(**ask)
    assert elsewhere.resolve(0.6, machine="nvidia-h200-bfloat16") == on_gpu.resolve(0.6)
    assert elsewhere.resolve(params=1e9) == CONFIG.full()  # needs no table


def test_a_machine_is_named_where_there_are_several_and_must_be_one_of_them():
    planner = Planner(CONFIG, (PREFILL, ON_GPU))
    for name in (None, "nvidia-h100"):
        with pytest.raises(
            ValueError, match=f"budget: machine must be one of amd-epyc.*, nvidia.*, got {name!r}"
        ):
            planner.resolve(0.6, machine=name)
    with pytest.raises(
        ValueError, match="machine must be given with a budget of latency, got 'x' with params"
    ):
        planner.resolve(params=1e9, machine="x")


def test_an_adaptive_budget_keeps_to_the_workload_of_its_calibration():
    planner = Planner(CONFIG, decoding(1, 8))
    assert planner.target(0.6, phase="decode", batch=2) == 0.6
    with pytest.raises(
        ValueError, match="near 1 and 64, for which the adaptive router is calibrated, got 8 and None"
    ):
        planner.target(0.6, phase="decode", batch=8)


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"device": "Intel(R) Xeon(R) CPU @ 2.20GHz", "threads": 8}, "intel-xeon-cpu-2-20ghz-8-threads"),
        ({"device": "NVIDIA A100-SXM4-80GB", "dtype": "bfloat16"}, "nvidia-a100-sxm4-80gb-bfloat16"),
        ({"device": "../../etc/passwd"}, "etc-passwd"),
        ({"device": "", "threads": None}, "unknown"),
    ],
)
def test_a_name_can_be_read_and_is_that_of_a_file(facts, name):
    assert name_of(facts) == name


def test_this_machine_has_a_name():
    facts = machine_on(torch.device("cpu"), torch.bfloat16)
    assert facts["threads"] == torch.get_num_threads() and name_of(facts).endswith("-bfloat16")
