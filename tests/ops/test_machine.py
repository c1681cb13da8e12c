"""Our GEMM or the vendor's, by what was measured: the rule, the file that keeps the times, and what comes of it."""

import json
import os

import pytest

from flextron_ext import _C

# Prints what is known of the machine, and which GEMM a large product has the bits of.
PROGRAM = """
import json, sys, time
begin = time.perf_counter()
import torch
from flextron_ext import elastic_linear, machine
torch.set_num_threads(1)
x, weight = torch.randn(512, 600), torch.randn(600, 600)
begin = time.perf_counter()
y = elastic_linear(x, weight, None, 600, 600)
few, extents = x[:100], torch.full((100,), 600)
mixed = elastic_linear(few, weight, None, 600, 600, in_extent=extents)
first = machine()
seconds = time.perf_counter() - begin
for file in sys.argv[2:]:
    open(file, "w").write("")
assert machine() == first and torch.equal(elastic_linear(x, weight, None, 600, 600), y)
rows = {f"{g['dtype']} {g['most']}": [g["own"], g["vendor"], g["chosen"]] for g in first["gemms"]}
vendor = torch.equal(y, torch.nn.functional.linear(x, weight))
kept = torch.equal(mixed[:50], elastic_linear(few[:50], weight, None, 600, 600, in_extent=extents[:50]))
kept = kept and not torch.equal(mixed, torch.nn.functional.linear(few, weight))
told = {"rows": rows, "kept": kept, "files": first["files"], "vendor": vendor, "seconds": seconds}
leaf, dy = few.clone().requires_grad_(), torch.randn(100, 600)
y = elastic_linear(leaf, weight, None, 600, 600)
(gradient,) = torch.autograd.grad(y, leaf, dy)
told["few"] = torch.equal(y, torch.nn.functional.linear(few, weight))
told["gradient"] = torch.equal(gradient, dy @ weight)
print(json.dumps(told))
"""


@pytest.fixture
def told(processes, tmp_path):
    def run(folder=tmp_path, *files, **variables):
        done = processes.alone(["-c", PROGRAM, *map(str, files)], FLEXTRON_CACHE=str(folder), **variables)
        return json.loads(done.out)

    return run


def injected(folder, own, vendor):
    """Every time that is kept, replaced."""
    for file in folder.glob("*float32.txt"):
        machine, *_ = file.read_text().splitlines()
        lines = [f"{rows} {own} {vendor}" for rows in (4, 32, 128, 512)]
        file.write_text("\n".join([machine, *lines, "end\n"]))


def test_another_gemm_is_chosen_only_where_it_is_clearly_faster():
    assert not _C.prefers_own(False, 0.95, 1.0) and _C.prefers_own(False, 0.9, 1.0)
    assert _C.prefers_own(True, 1.4, 1.0) and not _C.prefers_own(True, 1.6, 1.0)
    assert _C.prefers_own(True, 1.02, 1.0, trains=True) and not _C.prefers_own(True, 1.1, 1.0, trains=True)
    assert not _C.prefers_own(False, 0.95, 1.0, trains=True)


def test_what_was_measured_is_kept_and_chooses(told, tmp_path):
    first = told()
    assert len(list(tmp_path.iterdir())) == 3 and all(map(str.endswith, first["files"], [".txt"] * 3))
    assert all(own is None or 0 < own < 1 for own, *_ in first["rows"].values())
    injected(tmp_path, 1.0, 2.0)
    own = told()
    assert own["rows"]["float32 None"] == [1.0, 2.0, "own"] and not own["vendor"]
    injected(tmp_path, 2.0, 1.0)
    vendor = told()
    assert vendor["rows"]["float32 8"] == [2.0, 1.0, "vendor"] and vendor["vendor"]
    assert own["kept"] and vendor["kept"]  # a row with an extent of its own keeps its bits beside others
    assert not told(FLEXTRON_KERNEL="tile")["vendor"]
    injected(tmp_path, 1.0, 2.0)
    assert told(FLEXTRON_KERNEL="vendor")["vendor"]


def test_a_gradient_gives_up_ours_where_the_vendor_s_is_slightly_faster(told, tmp_path):
    told()
    for own, is_vendors in ((1.0, False), (1.1, True)):
        injected(tmp_path, own, 1.0)
        found = told()
        assert not found["few"] and found["gradient"] == is_vendors


def test_a_process_chooses_once(told, tmp_path):
    told()
    injected(tmp_path, 1.0, 2.0)
    assert not told(tmp_path, *tmp_path.iterdir())["vendor"]


def test_a_damaged_file_is_measured_again(told, tmp_path):
    told()
    (file,) = tmp_path.glob("*float32.txt")
    machine, *_ = file.read_text().splitlines()
    file.write_text(f"{machine}\n4 1 0.5\n")
    again = told()
    assert file.read_text().startswith(machine + "\n") and file.read_text().endswith("end\n")
    assert again["rows"]["float32 8"][:2] != [1, 0.5]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "other\nend\n",
        "this\n4 1\nend\n",
        "this\n4 1 -1\nend\n",
        "this\n5 1 1\nend\n",
        "this\n4 1 1\n",
    ],
)
def test_a_text_that_is_another_s_or_cut_has_no_times(text):
    assert _C.gemm_times("this", text) is None


def test_a_text_may_lack_what_was_disturbed():
    assert _C.gemm_times("this", "this\n32 1 0.5\nend\n") == [None, (1.0, 0.5), None, None]


def test_what_cannot_be_kept_is_not_used(told, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "below", ""):
        report = told(folder)
        assert [row[:2] for row in report["rows"].values()] == [[None, None]] * 12
        assert all("not measured" in file for file in report["files"])
        assert report["rows"]["float32 64"][2] == "own" and report["rows"]["float32 None"][2] == "vendor"
        assert report["vendor"]


def test_the_home_s_cache_is_the_place(processes, tmp_path):
    for name, below in (("XDG_CACHE_HOME", ("flextron",)), ("HOME", (".cache", "flextron"))):
        home = tmp_path / name
        places = {"XDG_CACHE_HOME": "", "HOME": "", name: str(home)}
        program = "import os; del os.environ['FLEXTRON_CACHE']\n" + PROGRAM
        done = processes.alone(["-c", program], **(dict(os.environ) | places))
        assert json.loads(done.out)["files"] and len(list(home.joinpath(*below).iterdir())) == 3
