"""Units of work on several processes, which answer in JSON; a process that dies is one sentence."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, cast

from flextron.documents.reading import Part
from flextron.tokens.work import Message, Settings, encoder_of, tokenised

# Errors that the user can mend, from reading and writing; any other is a fault of ours and keeps its traceback.
_EXPECTED = (ValueError, OSError, ImportError)


class Task(NamedTuple):
    """A unit, or the rest of one: the arguments of `tokenised`."""

    number: int
    unit: list[Part]
    read: int
    part: int


def run(settings: Settings, tasks: Iterable[Task], workers: int) -> Iterator[Message]:
    """Do the tasks, several at a time; yields what `tokenised` does, in the order in which it happens.

    Raises:
        ValueError: a source cannot be read, or a file not written.
        ChildProcessError: a process was killed.
    """
    if workers == 1:
        encode = encoder_of(settings)
        for task in tasks:
            yield from tokenised(settings, encode, *task)
        return
    context = multiprocessing.get_context("spawn")  # a fork does not take the threads of torch along
    busy: dict[Connection, Any] = {}
    waiting = iter(tasks)
    try:
        for _, task in zip(range(workers), waiting, strict=False):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there,), daemon=True)
            process.start()
            there.close()
            busy[here] = process
            _send(here, asdict(settings))
            _send(here, _as_json(task))
        while busy:
            for ready in wait(list(busy)):
                yield from _answers(cast(Connection, ready), busy, waiting)
    finally:
        for process in busy.values():
            process.terminate()
            process.join()


def _answers(here: Connection, busy: dict[Connection, Any], waiting: Iterator[Task]) -> Iterator[Message]:
    """Take a message from a process; one that is done gets another task, or may go."""
    try:
        message = json.loads(here.recv_bytes())
        if "done" in message:
            task = next(waiting, None)
            _send(here, task and _as_json(task))
            if task is None:
                busy.pop(here).join()
            return
    except (EOFError, ConnectionError):  # a broken pipe among them
        process = busy.pop(here)
        process.join()
        raise ChildProcessError(
            f"tokenize: its processes must live to the end, got one that ended with {process.exitcode}; run the same "
            "command again to go on, with fewer --workers where memory was short"
        ) from None
    if "error" in message:
        raise ValueError(message["error"])
    if "fault" in message:
        raise RuntimeError(message["fault"])
    yield message


def _work(there: Connection) -> None:
    """What a process of the pool does until it is sent nothing more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's; it ends its processes
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    try:
        settings = _settings(json.loads(there.recv_bytes()))
        encode = encoder_of(settings)
        while (task := json.loads(there.recv_bytes())) is not None:
            number, unit, read, part = task
            for message in tokenised(settings, encode, number, [Part(**p) for p in unit], read, part):
                _send(there, message)
            _send(there, {"done": number})
    except _EXPECTED as error:
        _send(there, {"error": str(error)})
    except Exception:
        import traceback

        _send(there, {"fault": traceback.format_exc()})


def _die_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _send(to: Connection, message: Any) -> None:
    to.send_bytes(json.dumps(message).encode())


def _as_json(task: Task) -> list[Any]:
    return [task.number, [asdict(part) for part in task.unit], task.read, task.part]


def _settings(values: dict[str, Any]) -> Settings:
    sides = values["sides"] and tuple(map(tuple, values["sides"]))
    return Settings(
        **values | {"before": tuple(values["before"]), "after": tuple(values["after"]), "sides": sides}
    )
