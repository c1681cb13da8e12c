"""Several processes of one command, as torchrun would start them, without torchrun's and Python's own seconds.

Run as a program it is the process that they are forked from, which has everything imported: one JSON object a line
comes in, ``{"ranks", "argv", "env"}`` to start processes, ``{"seconds"}`` to wait for them, or ``{"module"}``, which
all later ones find imported; one goes out, their ``{"pids"}`` or ``{"codes"}``. An ``argv`` that begins with ``-c`` is
Python, every other one a command of flextron's.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

SECONDS = 120.0  # that a test waits for its processes: a hang is a failure, not a wait
_KILLED = 137  # exit code of a process that a wait gave up on


@dataclass(frozen=True)
class Ended:
    """How one process ended; a signal is a negative ``rc``."""

    rc: int
    out: str
    err: str


class Processes:
    """The parent of all processes of a test session."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # one thread: none is there to be lost in a fork; torch's own remarks are not what a test reads
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self.server = subprocess.Popen([sys.executable, __file__], text=True, env=env, **pipes)
        self.folder = tempfile.TemporaryDirectory()

    def close(self) -> None:
        self.server.kill()
        self.server.wait()
        self.folder.cleanup()

    def start(self, size: int, argv: Sequence[Any], room: int | None = None, **environment: Any) -> list[int]:
        """Start a command as ranks 0 to ``size - 1`` of one machine, and return their process ids.

        With ``room`` a file of more bytes cannot be written, as on a full disk.
        """
        self.store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )  # as torchrun's agent has it
        given = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port}
        given |= {"TORCHELASTIC_USE_AGENT_STORE": True, "FLEXTRON_RANKS_TIMEOUT": 60, **environment}
        return self._start(size, argv, room, given)

    def _start(
        self, size: int, argv: Sequence[Any], room: int | None, environment: dict[str, Any]
    ) -> list[int]:
        request = {"ranks": size, "argv": [str(word) for word in argv], "folder": self.folder.name}
        env = {name: str(value) for name, value in environment.items()}
        return self._ask(request | {"room": room, "env": env})["pids"]

    def wait(self, seconds: float = SECONDS) -> list[Ended]:
        """Wait for the processes that were started last; those that do not end in time are killed."""
        codes = self._ask({"seconds": seconds})["codes"]
        return [Ended(code, self.said(rank), self.said(rank, "err")) for rank, code in enumerate(codes)]

    def run(self, size: int, argv: Sequence[Any], room: int | None = None, **environment: Any) -> list[Ended]:
        """Start a command and wait for it."""
        self.start(size, argv, room, **environment)
        return self.wait()

    def start_alone(self, argv: Sequence[Any], **environment: Any) -> int:
        """Start a command as one process, which torchrun knows nothing of, and return its process id."""
        (pid,) = self._start(1, argv, None, environment)
        return pid

    def alone(self, argv: Sequence[Any], **environment: Any) -> Ended:
        """Run a command as one process, which torchrun knows nothing of."""
        self.start_alone(argv, **environment)
        (ended,) = self.wait()
        return ended

    def load(self, module: str) -> None:
        """Import a module that the tests' own path finds, once for all processes to come."""
        self._ask({"module": module, "path": sys.path})

    def said(self, rank: int, stream: str = "out") -> str:
        """What a process has written so far."""
        return (Path(self.folder.name) / f"{rank}.{stream}").read_text()

    def ready(self, rank: int, text: str, seconds: float = SECONDS) -> None:
        """Wait until a process has written a text."""
        deadline = time.monotonic() + seconds
        while text not in self.said(rank) + self.said(rank, "err"):
            assert time.monotonic() < deadline, f"rank {rank} did not write {text!r}"
            time.sleep(0.005)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _child(rank: int, request: dict[str, Any]) -> None:
    """The forked process: never returns."""
    rc = 99
    try:
        for number, stream in ((1, "out"), (2, "err")):
            name = os.path.join(request["folder"], f"{rank}.{stream}")
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(request["env"])
        if "WORLD_SIZE" in os.environ:
            os.environ.setdefault("RANK", str(rank))
            os.environ.setdefault("LOCAL_RANK", str(rank))
        if request["room"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["room"],) * 2)
        argv = request["argv"]
        if argv[0] == "-c":
            sys.argv = argv
            exec(argv[1], {"__name__": "__main__"})
            rc = 0
        else:
            from flextron import cli

            rc = cli.main(argv)
    except SystemExit as error:
        rc = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        rc = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(rc)


def _codes(pids: list[int], seconds: float) -> list[int]:
    deadline, codes = time.monotonic() + seconds, dict.fromkeys(pids)
    while None in codes.values():
        for pid in [pid for pid, code in codes.items() if code is None]:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = _KILLED
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def _serve() -> None:
    from emulator import build as emulator

    emulator.load_in_process()  # before anything imports flextron_ext
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import conversion_mapping

    from flextron import pipeline, ui  # noqa: F401
    from flextron.cli import discovery

    discovery.commands()
    conversion_mapping.get_checkpoint_conversion_mapping(
        "llama"
    )  # compiles 1000 patterns, those of all families
    pids: list[int] = []
    for line in sys.stdin:
        request = json.loads(line)
        if "ranks" in request:
            pids = []
            for rank in range(request["ranks"]):
                for stream in ("out", "err"):
                    Path(request["folder"], f"{rank}.{stream}").write_text("")
                pid = os.fork()
                if pid == 0:
                    _child(rank, request)
                pids.append(pid)
            print(json.dumps({"pids": pids}), flush=True)
        elif "module" in request:
            sys.path[:] = request["path"]
            import_module(request["module"])
            print(json.dumps({}), flush=True)
        else:
            print(json.dumps({"codes": _codes(pids, request["seconds"])}), flush=True)


if __name__ == "__main__":
    _serve()
