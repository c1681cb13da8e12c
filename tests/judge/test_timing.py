"""What the clock promises: interleaving, setup outside the clock, statistics. No promise about any time."""

import pytest

from flextron.judge import timing
from flextron.judge.timing import NoiseWatch, Timing, bench, compare, wait_until_idle


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


def test_a_comparison_goes_on_until_it_is_enough(clock):
    asked = []

    def enough(reference, others):
        asked.append((len(reference.samples), len(others["x"].ratios)))
        return len(asked) == 3

    _, others = compare(("full", clock.spend(2.0)), {"x": clock.spend(1.0)}, 2, 0, enough=enough)
    assert asked == [(4, 2), (6, 3), (8, 4)] and others["x"].ratios == (0.5,) * 4


@pytest.fixture
def machine(clock, tmp_path, monkeypatch):
    """Four processors of ours and one that is not, in a /proc/stat that says what it is told."""
    stat = tmp_path / "stat"
    ticks = {f"cpu{i}": [0] * 8 for i in range(5)}
    cpu = [0.0]

    def spend(seconds, ours, others, elsewhere=0.0):
        """So many seconds pass, in which ``ours`` and ``others`` processors were busy."""
        clock.now += seconds
        cpu[0] += ours * seconds
        for name, load in [(f"cpu{i}", (ours + others) / 4) for i in range(4)] + [("cpu4", elsewhere)]:
            ticks[name][0] += round(100 * seconds * load)
            ticks[name][3] += round(100 * seconds * (1 - load))
        stat.write_text(
            "\n".join(f"{name} {' '.join(map(str, own))}" for name, own in ticks.items()) + "\nintr 1\n"
        )

    spend(0, 0, 0)
    monkeypatch.setattr(timing, "_PROCESSORS", stat)
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(timing, "process_time", lambda: cpu[0])
    return spend


@pytest.mark.parametrize(
    ("threads", "ours", "others", "taken"),
    [(4, 4, 0, 0.0), (4, 3, 1, 0.25), (2, 2, 1, 0.0), (2, 1.5, 2.5, 0.25), (8, 2, 2, 0.5)],
)
def test_what_other_programs_took_of_the_processors_that_we_use(machine, threads, ours, others, taken):
    watch = NoiseWatch(threads)
    machine(10, ours, others, elsewhere=1.0)
    noise = watch.noise([1.0] * 6)
    assert noise.taken == pytest.approx(taken) and noise.drift == noise.spread == 0
    assert (noise.sentence is None) == (taken == 0)
    if taken == 0.5:
        assert "too busy for these times to mean anything: other programs took 50% of the" in noise.sentence


def test_a_moment_and_a_system_that_does_not_tell_say_nothing(machine, monkeypatch, tmp_path):
    watch = NoiseWatch(4)
    machine(0.3, 0, 4)
    assert watch.noise([1.0]).taken is None
    monkeypatch.setattr(timing, "_PROCESSORS", tmp_path / "none")
    watch = NoiseWatch(4)
    machine(10, 0, 4)
    assert watch.noise([1.0]).taken is None


def test_drift_is_that_of_the_ends_and_spread_that_of_all(machine):
    watch = NoiseWatch(4)
    noise = watch.noise([1.0, 1.0, 1.0, 1.1, 1.2, 1.2])
    assert noise.drift == pytest.approx(0.2) and 0.15 < noise.spread < 0.2
    assert "took 20% more or less at the end than at the beginning" in noise.sentence
    assert "spread by 67%" in watch.noise([1.0, 2.0, 1.0, 2.0, 1.0, 2.0]).sentence
    assert watch.noise([1.0, 9.0]).drift == 0  # too few to tell


@pytest.mark.parametrize(
    ("candidates", "rounds", "seconds", "word"),
    [({}, 1, 0, "candidates"), ({"x": print}, 0, 0, "rounds"), ({"x": print}, 1, -1, "min_seconds")],
)
def test_bad_input_is_one_sentence(candidates, rounds, seconds, word):
    with pytest.raises(ValueError, match=f"bench: {word} must"):
        bench(candidates, rounds, seconds)


@pytest.mark.parametrize("busy", [1, 30, 200], ids=["idle", "for a while", "always"])
def test_the_wait_ends_when_others_do_or_time_is_up(clock, tmp_path, monkeypatch, capsys, busy):
    """The first looks see processors at work, those after them ones that are idle or wait for a disk."""
    ticks, looks = [0] * 8, 0

    def sleep(pause: float) -> None:
        nonlocal looks
        clock.now += pause
        looks += 1
        used = 100 if looks < busy else 5
        for field, more in ((0, used), (3, 60 - used * 0.6), (4, 40 - used * 0.4)):
            ticks[field] += int(more)
        stat.write_text(f"cpu  {' '.join(map(str, ticks))} 0 0\ncpu0 1 2 3\n")

    stat = tmp_path / "stat"
    stat.write_text("cpu  0 0 0 0 0 0 0 0 0 0\n")
    monkeypatch.setattr(timing, "_PROCESSORS", stat)
    monkeypatch.setattr(timing, "sleep", sleep)
    wait_until_idle(60.0)
    assert clock.now == min(busy * 0.5, 60.5)
    assert ("got 100% busy after 60 s" in capsys.readouterr().out) == (busy > 120)
