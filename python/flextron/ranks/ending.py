"""How several processes end when one of them fails: one sentence from one of them, and none of them left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_OWN = 1.0  # seconds that a rank above 0 keeps an error of its own back, for rank 0 may have the same
_LOST = 2.0  # seconds that a rank waits for the one that failed, or for the death of the one that was killed, to show
_KEPT = 10.0  # seconds that rank 0 gives the others to read that it has told
_GRACE = 5.0  # seconds that SIGTERM leaves a rank that waits inside a library, as for a GPU
_STEP = 0.02  # seconds between two looks


class LostError(ConnectionError):
    """The ranks cannot be joined, or one of them is gone."""


class _Stopped(BaseException):
    """SIGTERM came."""


class Ending:
    """What the ranks of one command know of each other's end.

    Args:
        who: begins the message.
        rank: this one's, of ``size``.
        store: that all ranks have joined.
        again: what to do when ranks were lost.
    """

    def __init__(self, who: str, rank: int, size: int, store: dist.Store, again: str) -> None:
        self.who, self.rank, self.size, self.store, self.again = who, rank, size, store, again
        self.peers: list[dict[str, Any]] = []
        self.dead: list[int] = []
        self.settling = False

    def met(self, choose: Callable[[], torch.device]) -> torch.device:
        """Learn where the other ranks are, and choose a device; an error of one is an error of all."""
        device, refused = None, ""
        try:
            device = choose()
        except ValueError as error:
            refused = str(error)
        own = {"host": socket.gethostname(), "pid": os.getpid(), "refused": refused}
        self.store.set(f"met/{self.rank}", json.dumps(own))
        self.peers = [json.loads(self.store.get(f"met/{other}")) for other in range(self.size)]
        for peer in self.peers:
            if peer["refused"]:
                raise ValueError(peer["refused"])
        assert device is not None
        return device

    def connected(self, limit: timedelta) -> None:
        """Wait until all ranks are connected: one that left before would look lost to those that still connect."""
        self.store.set(f"connected/{self.rank}", "")
        all_ranks = [f"connected/{other}" for other in range(self.size)]
        deadline = time.monotonic() + limit.total_seconds()
        while not self.store.check(
            all_ranks
        ):  # not the store's own wait, which writes a line when it gives up
            if self._gone() or self.store.check(["told"]) or time.monotonic() > deadline:
                raise dist.DistStoreError("the ranks' connecting timed out")
            time.sleep(_STEP)

    def settled(self, error: BaseException) -> BaseException:
        """The error that a rank ends by: its own, LostError, or SystemExit where another rank tells what happened."""
        self.settling = True
        is_own = not (isinstance(error, _Stopped | dist.DistError) or "gloo/transport" in str(error))
        if not self._speaks(is_own):
            return SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2)
        return error if is_own else LostError(self._sentence(error))

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Let SIGTERM end the ``with`` block as an error does, even while the process waits inside a library."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._signalled = theirs  # open as long as the handler is set, after an error too
        handler = signal.signal(signal.SIGTERM, self._stop)
        waker = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(ours,), daemon=True).start()
        yield
        # not after an error: SIGTERM must not come between it and its sentence
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGTERM, handler)
        theirs.close()

    def _stop(self, *_: Any) -> None:
        if not self.settling:
            raise _Stopped

    def _watch(self, signals: socket.socket) -> None:
        """Wait for SIGTERM, and end the process when its main thread does not."""
        with signals:
            while heard := signals.recv(1):
                if heard[0] == signal.SIGTERM:
                    break
            else:
                return  # the block ended
        time.sleep(_GRACE)
        if self._speaks(own=False):
            os.write(2, f"flextron: {self._sentence(_Stopped())}\n".encode())
        os._exit(2)

    def _speaks(self, own: bool) -> bool:
        """Whether this rank tells what happened; exactly one does, as long as the store is there."""
        try:
            self._wait(0.0 if own and self.rank == 0 else _OWN if own else _LOST, not own)
            self.dead = self._gone()  # before the others read that this rank tells, and end
            place = self.store.add("told", 1)
            if place == 1 and self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self._keep_store()
            return place == 1
        except RuntimeError:  # the store went with its process
            self.dead = self._gone()
            return own or self.rank == min({*range(self.size)} - {*self.dead})

    def _wait(self, seconds: float, lost: bool) -> None:
        """Wait until another rank has told, or one is seen to be dead if one was lost."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.store.check(["told"]):
            if lost and self._gone():
                return
            time.sleep(_STEP)

    def _keep_store(self) -> None:
        """Let the others read that this rank tells before the store goes with it, where no agent of torchrun has it."""
        deadline = time.monotonic() + _KEPT
        while time.monotonic() < deadline and self.store.add("told", 0) < self.size > len(self._gone()) + 1:
            time.sleep(_STEP)

    def _sentence(self, error: BaseException) -> str:
        if self.dead:
            got = f"rank{'s' * (len(self.dead) > 1)} {', '.join(map(str, self.dead))} gone"
        elif isinstance(error, _Stopped):
            got = "a signal to stop"
        else:
            got = "one that does not answer" if re.search("[Tt]imed? ?out", str(error)) else "one gone"
        return f"{self.who}: all {self.size} processes must stay alive, got {got}; {self.again}"

    def _gone(self) -> list[int]:
        """The ranks of this machine that are dead."""
        here = socket.gethostname()
        return [i for i, peer in enumerate(self.peers) if peer["host"] == here and not _is_alive(peer["pid"])]


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that has died and was not waited for does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
