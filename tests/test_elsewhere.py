"""Every stage runs on another device than the CPU: what it makes lies there, and nothing of the CPU's meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STAGES = (
    *("convert", "convert_in_memory", "train", "profile", "profile_adaptive", "route_search", "route_gumbel"),
    *("route_adaptive_surrogate", "route_adaptive", "evaluate", "generate", "generate_text"),
    *("padded_on_the_right", "half", "extract", "export", "save", "tune", "tune_adaptive"),
)


@pytest.fixture(scope="module")
def raised(processes) -> dict[str, str]:
    """Stage -> what it raised. The device is registered with torch for a whole process, so it has one of its own."""
    done = processes.alone(["-c", "import elsewhere; elsewhere.main()"])
    assert done.rc == 0, done.err
    return json.loads(done.out)


def test_all_stages_are_here(raised):
    assert tuple(raised) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_keeps_to_its_device(raised, stage):
    assert not raised[stage], raised[stage][-3000:]


def test_a_tensor_that_was_left_on_the_cpu_is_seen(processes):
    program = (
        "import torch; from second_device import FAKE\n"
        "x, w = torch.ones(2, 2), torch.ones(2, 2).to(FAKE)\n"
        "for call in (lambda: x @ w, lambda: w.numpy(), lambda: torch.cat([w, x])):\n"
        "    try: call()\n"
        "    except (RuntimeError, TypeError): print('seen')\n"
        "print((w @ w).device, (x @ w.cpu()).device)"
    )
    done = processes.alone(["-c", program])
    assert done.rc == 0, done.err
    assert done.out.split() == ["seen"] * 3 + ["fake:0", "cpu"]
