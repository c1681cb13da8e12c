"""Every test starts from one seed, and memory that nothing wrote reads NaN. FLEXTRON_EMULATE: on emulated kernels."""

import os

import pytest
import torch
from emulator import build as emulator

emulator.load_asked()
EMULATE = emulator.loaded()

from processes import Processes  # noqa: E402

from flextron_ext import build_info  # noqa: E402

os.environ["FLEXTRON_CACHE"] = ""  # a test's GEMMs are not chosen by what this machine measured
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(2)  # side by side; two, so that work is shared as it is elsewhere
    os.environ["OMP_NUM_THREADS"] = "2"  # of the processes that tests start, too: they are one machine
SEED = int(os.environ.get("FLEXTRON_EMULATE_SEED", "0"))
ORDER = os.environ.get("FLEXTRON_EMULATE_ORDER", "random" if SEED else "forward")

# What looks at how the CPU computes, not at what.
HOST_ONLY = {
    "test_work_is_proportional_to_the_extents": "counts the host's GEMMs; test_emulator.py counts the kernels' bytes",
    "test_our_own_gemm_gives_a_prefix_the_bits_of_the_sliced_weight": "asks for the host's kernels",
    "test_threads_do_not_change_a_bit": "changes the host's threads",
}


def pytest_terminal_summary(terminalreporter):
    if EMULATE:
        path = os.environ.get("FLEXTRON_ARCH", "90")
        terminalreporter.write_line(f"emulated CUDA kernels: path {path}, order {ORDER}, seed {SEED}")


def pytest_collection_modifyitems(items):
    for item in items if EMULATE else ():
        if reason := HOST_ONLY.get(item.name.split("[")[0]):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    if EMULATE:
        emulator.set_order(SEED, ORDER)
        emulator.reset(banks=False)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Deterministic mode fills what `empty` hands out, in C++ too: none can pass for zero."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def auto_is_the_cpu(monkeypatch):
    """Stages run where they run without a GPU; tests of ops, and gpu_check.sh, are for the GPU."""
    if torch.cuda.is_available():
        from flextron.nn import placement

        monkeypatch.setattr(placement, "_takes_gpus", lambda who: False)


@pytest.fixture
def a_gpu_or_its_emulator(device):
    """For tests of CUDA kernels: skipped where none runs."""
    if device == "cpu" and not EMULATE:
        pytest.skip("needs a GPU, or FLEXTRON_EMULATE=1")


@pytest.fixture
def hopper_or_its_emulator(device, a_gpu_or_its_emulator):
    """The same of Hopper's."""
    if os.environ.get("FLEXTRON_ARCH", "90") != "90":
        pytest.skip("FLEXTRON_ARCH asks for the portable kernels")
    if device != "cpu" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of sm_90, or FLEXTRON_EMULATE=1")


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() and build_info()["cuda"] else ["cpu"]


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def processes():
    """Starts commands in several processes, as torchrun does."""
    found = Processes()
    yield found
    found.close()
