"""However several processes end, one of them says why in one sentence, and all of them end."""

import gc
import os
import signal
from datetime import timedelta

import pytest
import torch.distributed as dist
from processes import free_port

from flextron.ranks.ending import Ending

WORK = """
import os, signal, sys, time
from flextron import ranks
import torch

mode = sys.argv[2]
try:
    with ranks.joined("train", again="start it again") as me:
        if mode == "all" or (mode == "last" and me.rank == 2) or (mode == "first" and me.rank == 0):
            raise ValueError(f"train: seed must be even, got {me.rank}")
        if mode == "killed" and me.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "alone":
            ranks.first(lambda: (_ for _ in ()).throw(OSError("disk is full")))
        print("ready", flush=True)
        while True:
            if mode == "busy":
                time.sleep(0.01)
            elif mode == "stuck" and me.rank == 1:
                time.sleep(1000)
            else:
                ranks.mean(torch.ones(3))
except (ValueError, OSError) as error:
    print(f"flextron: {error}", file=sys.stderr)
    sys.exit(2)
"""

LATE = """
import os, signal, sys, time
from flextron import ranks
import torch.distributed as dist

connect = dist.new_group

def late(*args, **keywords):
    group = connect(*args, **keywords)
    if dist.get_rank() == 1:
        if sys.argv[2] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        print(time.monotonic())
    return group

dist.new_group = late
try:
    with ranks.joined("train", again="start it again") as me:
        if me.rank != 1:
            print(time.monotonic())
except OSError as error:
    print(f"flextron: {error}", file=sys.stderr)
    sys.exit(2)
"""

STOPPED = "train: all 2 processes must stay alive, got a signal to stop; start it again"


def told(ended):
    """Every exit code, and what was said by all together."""
    return [e.rc for e in ended], "".join(e.err for e in ended)


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("all", "train: seed must be even, got 0"),
        ("first", "train: seed must be even, got 0"),
        ("last", "train: seed must be even, got 2"),
        ("alone", "disk is full"),
    ],
)
def test_an_error_is_said_once(processes, mode, sentence):
    assert told(processes.run(3, ["-c", WORK, mode])) == ([2, 2, 2], f"flextron: {sentence}\n")


def test_an_error_is_said_once_where_no_agent_of_torchrun_holds_the_store(processes):
    own = {"TORCHELASTIC_USE_AGENT_STORE": False, "MASTER_PORT": free_port()}
    ended = processes.run(3, ["-c", WORK, "first"], **own)
    assert told(ended) == ([2, 2, 2], "flextron: train: seed must be even, got 0\n")


def test_a_killed_rank_is_named(processes):
    codes, said = told(processes.run(3, ["-c", WORK, "killed"]))
    assert codes == [2, -signal.SIGKILL, 2]
    assert said == "flextron: train: all 3 processes must stay alive, got rank 1 gone; start it again\n"


def test_no_rank_goes_on_and_may_fail_before_all_are_connected(processes):
    ended = processes.run(3, ["-c", LATE, "slow"])
    assert [e.rc for e in ended] == [0, 0, 0]
    one, connected, other = (float(e.out) for e in ended)
    assert min(one, other) > connected


def test_a_rank_that_is_killed_while_it_connects_is_named(processes):
    codes, said = told(processes.run(3, ["-c", LATE, "killed"]))
    assert codes == [2, -signal.SIGKILL, 2]
    assert said == "flextron: train: all 3 processes must stay alive, got rank 1 gone; start it again\n"


def test_a_rank_that_never_connects_is_not_waited_for_without_end():
    store, limit = dist.HashStore(), timedelta(seconds=0.1)
    with pytest.raises(dist.DistStoreError, match="timed out") as caught:
        Ending("train", 0, 2, store, "again").connected(limit)
    store.set("connected/1", "")
    Ending("train", 0, 2, store, "again").connected(limit)
    told_of = Ending("train", 0, 2, store, "again").settled(caught.value)
    assert str(told_of) == "train: all 2 processes must stay alive, got one that does not answer; again"


def test_a_signal_to_stop_ends_ranks_that_compute(processes):
    pids = processes.start(2, ["-c", WORK, "busy"])
    for rank, pid in enumerate(pids):
        processes.ready(rank, "ready")
        os.kill(pid, signal.SIGTERM)
    assert told(processes.wait()) == ([2, 2], f"flextron: {STOPPED}\n")


def test_a_signal_to_stop_ends_a_rank_that_waits_inside_a_library(processes):
    waiting, stuck = processes.start(2, ["-c", WORK, "stuck"])
    for rank in range(2):
        processes.ready(rank, "ready")
    os.kill(waiting, signal.SIGTERM)
    processes.ready(0, STOPPED)
    os.kill(stuck, signal.SIGKILL)
    assert told(processes.wait()) == ([2, -signal.SIGKILL], f"flextron: {STOPPED}\n")


def test_a_signal_to_stop_after_the_error_is_not_told(monkeypatch, capfd):
    kept = []
    monkeypatch.setattr(
        Ending, "_watch", lambda self, signals: kept.append(signals)
    )  # it would end this process
    handler, waker = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    ending = Ending("train", 0, 2, dist.HashStore(), "again")
    ending.settling = True
    try:
        with pytest.raises(ValueError, match="its own"), ending.heeded():
            raise ValueError("its own")
        gc.collect()
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGTERM, handler)
    assert capfd.readouterr().err == ""
