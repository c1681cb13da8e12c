"""What the emulator promises: planted faults are caught, their corrected twins never, and words are right."""

import math
import os
import subprocess
import sys

import pytest
from emulator import build as emulator

if not emulator.loaded():
    pytest.skip("FLEXTRON_EMULATE=1 asks for the emulator", allow_module_level=True)

SANITIZED = os.environ.get("FLEXTRON_EMULATE_SANITIZE") == "1"
SEEDS = range(20)
RUNS = [(0, "forward"), *((seed, name) for name in ("random", "ahead", "behind") for seed in SEEDS)]

FAULTS = emulator.faults()
each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
each_run = pytest.mark.parametrize("seed, name", [(0, "forward"), (1, "random"), (1, "ahead"), (1, "behind")])


def outcomes(run) -> tuple[set[tuple], set[str]]:
    """The values (NaN as None) and the errors that running it in every order gives."""
    values, errors = set(), set()
    for seed, name in RUNS:
        with emulator.order(seed, name):
            try:
                values.add(tuple(None if math.isnan(value) else value for value in run()))
            except RuntimeError as error:
                errors.add(str(error))
    return values, errors


@each_fault
def test_a_planted_fault_is_caught(fault):
    if fault.outcomes == ("asan",):
        pytest.skip("test_address_sanitizer_catches_it")
    values, errors = outcomes(fault.run)
    right, _ = outcomes(lambda: fault.run(planted=False))
    caught = {
        "error": bool(errors),
        "seeds": len(values) > 1,
        "poison": any(None in found for found in values),
        "stale": bool(values - right),
    }
    assert any(caught.get(outcome) for outcome in fault.outcomes), (values, errors)
    for error in errors:
        assert all(word in error for word in fault.words), error


@each_fault
def test_the_corrected_twin_passes(fault):
    """In every order, and always with the same result."""
    values, errors = outcomes(lambda: fault.run(planted=False))
    assert not errors and len(values) == 1, (values, errors)


@pytest.mark.skipif(not SANITIZED, reason="FLEXTRON_EMULATE_SANITIZE=1 asks for AddressSanitizer")
@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if "asan" in fault.outcomes], ids=lambda fault: fault.name
)
def test_address_sanitizer_catches_it(fault):
    program = (
        "import sys\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from emulator import build as emulator\n"
        "emulator.load(sanitize=True)\n"
        f"next(fault for fault in emulator.faults() if fault.name == {fault.name!r}).run()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr, done.stderr


@pytest.mark.parametrize("word", emulator.words())
@each_run
def test_a_word_computes_what_it_says(word, seed, name):
    with emulator.order(seed, name):
        emulator.check_word(word)


def test_an_unknown_order_is_refused():
    with pytest.raises(RuntimeError, match="order must be forward, random, ahead or behind, got backward"):
        emulator.set_order(0, "backward")
