"""What the clock promises: interleaving, setup outside the clock, statistics. No promise about any time."""

import pytest

from flextron.testing import timing
from flextron.testing.timing import Timing, bench, compare


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""

    class Clock:
        now = 0.0

        def spend(self, seconds: float):
            def run() -> None:
                self.now += seconds

            return run

    clock = Clock()
    monkeypatch.setattr(timing, "perf_counter", lambda: clock.now)
    return clock


def test_median_and_quartiles_of_known_samples():
    t = Timing.of([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (t.p25, t.median, t.p75) == (2.0, 3.0, 4.0)
    assert t.spread == pytest.approx(2 / 3)


def test_each_callable_gets_its_own_time(clock):
    times = bench({"short": clock.spend(1.0), "long": clock.spend(3.0)}, rounds=3, min_seconds=0)
    assert times["short"].samples == (1.0,) * 3
    assert times["long"].median == 3.0


def test_a_sample_repeats_until_it_is_long_enough(clock):
    calls = []

    def run() -> None:
        calls.append(1)
        clock.now += 0.25

    times = bench({"x": run}, rounds=1, min_seconds=1.0)
    assert len(calls) == 2 + 4  # warm-up, then one sample
    assert times["x"].median == 0.25


def test_rounds_alternate_their_order():
    seen = []
    bench({n: lambda n=n: seen.append(n) for n in "ab"}, rounds=3, min_seconds=0)
    assert "".join(seen[4:]) == "ab" + "ba" + "ab"


def test_setup_runs_before_each_sample_and_is_not_timed(clock):
    seen = []

    def setup(name: str) -> None:
        seen.append(name)
        clock.now += 100

    times = bench({"x": clock.spend(1.0)}, rounds=2, min_seconds=0, setup=setup)
    assert seen == ["x"] * 4
    assert times["x"].samples == (1.0, 1.0)


def test_linear_drift_cancels_in_a_comparison(clock):
    drift = [0.0]

    def run(seconds: float):
        def call() -> None:
            drift[0] += 0.01  # every call finds a slower machine
            clock.now += seconds + drift[0]

        return call

    def same() -> None:
        run(1.0)()

    _, others = compare(("full", same), {"same": same}, rounds=3, min_seconds=0)
    assert others["same"].ratio == pytest.approx(1.0, abs=1e-12)


def test_the_ratio_is_to_the_neighbours(clock):
    reference, others = compare(
        ("full", clock.spend(4.0)), {"half": clock.spend(2.0)}, rounds=2, min_seconds=0
    )
    assert reference.median == 4.0
    assert others["half"].ratios == (0.5, 0.5)


@pytest.mark.parametrize(
    ("candidates", "rounds", "seconds", "word"),
    [({}, 1, 0, "candidates"), ({"x": print}, 0, 0, "rounds"), ({"x": print}, 1, -1, "min_seconds")],
)
def test_bad_input_is_one_sentence(candidates, rounds, seconds, word):
    with pytest.raises(ValueError, match=f"bench: {word} must"):
        bench(candidates, rounds, seconds)
