"""A process that has everything imported and forks for each case: what a file does to a command, in milliseconds.

One JSON object a line comes in, ``{"argv": [...]}``, with ``"limit"``: bytes that a file may have; one goes out,
``{"rc", "out", "err"}``. ``argv`` is a command line of flextron's or begins with one of `READERS`. With ``"warm"`` it
is not forked: what it imports is then there for every later case.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

SECONDS = 60
_MEMORY = 8 << 30  # bytes of address space: what a forged size asks for is refused, not given


def resume(directory: str) -> str:
    """What a run reads before it goes on, but the weights of the model that it belongs to."""
    from flextron.training.metrics import read_metrics
    from flextron.training.resume import Checkpoints
    from flextron.training.storing import names_in
    from flextron_lab.report.checkpoint import _training

    run = json.loads((Path(directory) / "run.pristine").read_text())
    weights = run.pop("weights")
    saved = Checkpoints(Path(directory), run, weights, {}).latest()
    records = read_metrics(Path(directory) / "metrics.jsonl")
    return f"{saved.step} {len(names_in(saved.place))} {saved.position} {records} {len(_training(Path(directory)))}"


def plain(directory: str) -> str:
    from flextron import load_plain

    return str(sum(float(p.double().sum()) for p in load_plain(directory).parameters()))


def documents(path: str) -> str:
    from flextron.data import read_documents

    return str(list(read_documents(path)))


def study(directory: str) -> str:
    from flextron_lab.study.run import Study

    return str(Study("stories260k", directory, (0,), lambda *_: None).done())


READERS = {f.__name__: f for f in (resume, plain, documents, study)}


def run(argv: list[str]) -> int:
    from flextron import cli
    from flextron.cli.printing import warn

    if argv[0] not in READERS:
        return cli.main(argv)
    warnings.showwarning = warn
    try:
        print(READERS[argv[0]](*argv[1:]))
    except (ValueError, OSError) as error:
        print(f"flextron: {error}", file=sys.stderr)
        return 2
    return 0


def child(case: dict[str, Any], out: int, err: int) -> None:
    """The forked process: never returns."""
    rc = 99
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        if "limit" in case:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], case["limit"]))
        rc = run(case["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(rc)


def main() -> None:
    import torch

    torch.set_num_threads(1)  # a fork does not take a pool of threads along
    for line in sys.stdin:
        case = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            if case.pop("warm", False):
                with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                    status = run(case["argv"]) << 8
            else:
                if (pid := os.fork()) == 0:
                    child(case, out.fileno(), err.fileno())
                status = os.waitpid(pid, 0)[1]
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode("utf-8", "replace"))
            answer = {"rc": os.waitstatus_to_exitcode(status), "out": said[0], "err": said[1]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
