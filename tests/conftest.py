"""Every test starts from one seed, and memory that nothing wrote reads NaN."""

import pytest
import torch

from flextron_ext import build_info


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Deterministic mode fills what `empty` hands out, in C++ too: none can pass for zero."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() and build_info()["cuda"] else ["cpu"]


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())
