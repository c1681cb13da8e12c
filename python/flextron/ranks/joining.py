"""Joining the processes that torchrun started, and what they tell each other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flextron.ranks.ending import Ending, LostError
from flextron.sentences import first_line, listed

T = TypeVar("T")
Rows = TypeVar("Rows", Tensor, range)

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT = 600.0  # seconds that a rank waits for the others, to join and in every exchange
_PATIENCE = timedelta(days=1)  # and for what rank 0 does alone; one that dies is noticed at once all the same


class Ranks(NamedTuple):
    """This process among those that run one command.

    Attributes:
        rank: its number, from 0.
        size: how many processes there are.
        local: its number among those of this machine.
        device: where its model lies.
    """

    rank: int
    size: int
    local: int
    device: torch.device


ALONE = Ranks(0, 1, 0, torch.device("cpu"))
_now = ALONE
_patient: dist.ProcessGroup | None = None


def is_started() -> bool:
    """Whether the environment says that this process is one of several ranks."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def now() -> Ranks:
    """This process's rank; `ALONE` outside of `joined`."""
    return _now


def is_first() -> bool:
    """Whether this is rank 0, which prints and writes for all."""
    return _now.rank == 0


def part(count: int) -> slice:
    """The consecutive part of ``count`` rows that is this rank's; the parts differ by at most one row."""
    return slice(count * _now.rank // _now.size, count * (_now.rank + 1) // _now.size)


@contextmanager
def joined(
    who: str,
    choose: Callable[[], torch.device] = lambda: torch.device("cpu"),
    again: str = "start the same command again",
) -> Iterator[Ranks]:
    """Join the ranks that torchrun started for this command, and leave them at the end of the ``with`` block.

    Messages on the CPU go through gloo, those of GPU tensors through NCCL. Where torchrun did not start this
    process, it is `ALONE`. Where the ranks are joined already, by a caller or by a script, nothing is done again.

    An error that leaves the ``with`` block ends all ranks, and one of them has it: a rank with an error of its own
    before those that only lost it, of several the first. The others leave by SystemExit, without a word. A rank
    that is killed, or told to stop by SIGTERM as torchrun does once another failed, is a `LostError`.

    Args:
        who: begins the message.
        choose: returns this rank's device, or says by ValueError why there is none; an error of one is an error of all.
        again: what to do when ranks were lost.

    Raises:
        ValueError: the environment is not torchrun's, or a rank has no device.
        LostError: the ranks cannot reach each other, or lose each other inside the ``with`` block.
    """
    if _now is not ALONE or not is_started():
        yield _now
        return
    rank, size, local = _numbers(who)
    limit = timedelta(seconds=_seconds(who))
    if dist.is_initialized():  # by a script, which ends it too
        with _as(Ranks(rank, size, local, _with_messages(who, choose))) as me:
            yield me
        return
    ending = Ending(who, rank, size, _rendezvous(who, size, limit), again)
    with ending.heeded():
        try:
            place = ending.met(partial(_with_messages, who, choose))
            _connect(ending.store, rank, size, place, limit)
            with _as(Ranks(rank, size, local, place)) as me:
                ending.connected(limit)
                yield me
        except BaseException as error:
            if not torch.cuda.is_initialized():  # NCCL may hang by now; gloo tells the others
                _disconnect()
            if (told := ending.settled(error)) is error:
                raise
            raise told from error
        _disconnect()


@contextmanager
def _as(me: Ranks) -> Iterator[Ranks]:
    global _now, _patient
    before = _now, _patient
    _now = me
    if me is not ALONE:
        _patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield me
    finally:
        _now, _patient = before


def agree(who: str, facts: Mapping[str, Any]) -> None:
    """Raise ValueError on every rank, in one sentence, unless all ranks have the same facts (JSON values)."""
    texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
    found = [json.loads(text) for text in every(json.dumps(texts))]
    names = dict.fromkeys(name for of_rank in found for name in of_rank)
    for name in names:
        values = [of_rank.get(name, "nothing") for of_rank in found]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"{who}: {name} must be the same on all {len(found)} processes, got {_short(values[0])} on rank 0 "
                f"and {_short(values[other])} on rank {other}"
            )


def shared(value: T) -> T:
    """Rank 0's value on every rank: a JSON value (a tuple arrives as a list), or a tensor of one shape everywhere."""
    if _now.size == 1:
        return value
    if isinstance(value, Tensor):
        dist.broadcast(value, 0)
        return value
    found: T = json.loads(_text(json.dumps(value) if is_first() else ""))
    return found


def first(work: Callable[[], T], answer: Callable[[str], object] | None = None) -> T:
    """What ``work`` returns on rank 0, which alone does it; a JSON value. Its error is one of all ranks.

    It begins once all ranks are there. The others wait for it without using a processor or a GPU; what ``work`` then
    asks of all ranks, by `ask`, they do by ``answer``.
    """
    if _now.size == 1:
        return work()
    dist.barrier(_patient)
    if not is_first():
        while (told := json.loads(_text(""))).keys() == {"asked"}:
            if answer is not None:
                answer(told["asked"])
        if told["refused"] is not None:
            raise ValueError(told["refused"])
        found: T = told["found"]
        return found
    try:
        with _as(ALONE):  # what it calls must not wait for the others
            found = work()
    except (ValueError, OSError, NotImplementedError) as error:
        _text(json.dumps({"refused": first_line(error)}))
        raise
    _text(json.dumps({"refused": None, "found": found}))
    return found


def ask(what: str) -> None:
    """In the work of `first`, on rank 0 alone: the other ranks now call its ``answer`` with ``what``."""
    _text(json.dumps({"asked": what}))


def divided(items: Sequence[T], check: Callable[[T], object], kind: type[ValueError] = ValueError) -> None:
    """Check items, each on one rank; an error of ``kind`` is one of all ranks. All ranks have the same items."""
    fault = ""
    try:
        for item in items[_now.rank :: _now.size]:
            check(item)
    except kind as error:
        fault = str(error)
    if faults := [text for text in every(fault) if text]:
        raise kind(faults[0])


def total(tensor: Tensor) -> Tensor:
    """The sum over the ranks' tensors, which have one shape and dtype; the same bits everywhere."""
    if _now.size == 1:
        return tensor
    found = tensor.clone()
    dist.all_reduce(found)
    return found


def mean(tensor: Tensor, weight: float = 1.0) -> Tensor:
    """The mean over the ranks' tensors, which have one shape and dtype, by the weights of the ranks."""
    if _now.size == 1:
        return tensor
    return total(tensor * weight) / float(total(torch.tensor(weight, dtype=torch.float64)))


def gathered(tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor, which have one shape and dtype, in the order of ranks."""
    if _now.size == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(_now.size)]
    dist.all_gather(found, tensor.contiguous())
    return found


def rows_of(who: str, rows: Rows, group: int = 1) -> Rows:
    """This rank's `part` of the rows, of which ``group`` at a time stay together.

    Raises:
        ValueError: there is not a group for every rank; the message begins with ``who``.
    """
    groups = len(rows) // group
    if groups < _now.size:
        raise ValueError(
            f"{who} must be at least {_now.size * group} for {_now.size} processes, got {len(rows)}"
        )
    mine = part(groups)
    return rows[mine.start * group : mine.stop * group]


def over_rows(rows: Tensor, measure: Callable[[Tensor], Tensor], group: int = 1) -> Tensor:
    """``measure``, a mean over groups of rows, of all ``rows``: every rank measures its part of them.

    Where there is not a group for every rank, every rank measures all of them.
    """
    if _now.size == 1 or len(rows) // group < _now.size:
        return measure(rows)
    mine = rows_of("", rows, group)
    return mean(measure(mine), len(mine))


def _numbers(who: str) -> tuple[int, int, int]:
    """(rank, size, local rank), as torchrun gives them in the environment."""
    if missing := [name for name in _ENVIRONMENT if not os.environ.get(name)]:
        raise ValueError(
            f"{who}: torchrun must set {', '.join(_ENVIRONMENT)} in the environment, got no {listed(missing)}"
        )
    found = []
    for name in _ENVIRONMENT[:3]:
        value = os.environ[name]
        if not value.isdecimal():
            raise ValueError(f"{who}: {name} must be a whole number of at least 0, got {value}")
        found.append(int(value))
    rank, size, local = found
    if rank >= size:
        raise ValueError(f"{who}: RANK must be below WORLD_SIZE ({size}), got {rank}")
    return rank, size, local


def _with_messages(who: str, choose: Callable[[], torch.device]) -> torch.device:
    """The device that is chosen, where processes on it can send messages."""
    device = choose()
    if device.type == "cuda" and not dist.is_nccl_available():
        raise ValueError(
            f"{who}: torch must have NCCL for GPUs in several processes, got a torch without it; give --device cpu"
        )
    return device


def _rendezvous(who: str, size: int, limit: timedelta) -> dist.Store:
    """The store that all ranks have joined."""
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        return store
    except (RuntimeError, OSError) as error:  # torch's DistError among them
        if "EADDRINUSE" in str(error):
            raise LostError(
                f"{who}: port {os.environ['MASTER_PORT']} must be free, got one that another program listens on; "
                "give torchrun another --master-port, or --standalone"
            ) from None
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LostError(
            f"{who}: all {size} processes must reach {place} within {limit.total_seconds():.0f} s, "
            f"got {first_line(error)}"
        ) from None


def _connect(store: dist.Store, rank: int, size: int, device: torch.device, limit: timedelta) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=limit,
        device_id=device if on_gpu else None,
    )


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _seconds(who: str) -> float:
    given = os.environ.get("FLEXTRON_RANKS_TIMEOUT", str(_TIMEOUT))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(f"{who}: FLEXTRON_RANKS_TIMEOUT must be a number of seconds, got {given}")
    return seconds


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def every(text: str) -> list[str]:
    """Every rank's text, in the order of ranks."""
    if _now.size == 1:
        return [text]
    own = _letters(text)
    lengths = [torch.zeros((), dtype=torch.int64) for _ in range(_now.size)]
    dist.all_gather(lengths, torch.tensor(len(own)))
    longest = int(max(lengths))
    found = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(found, torch.nn.functional.pad(own, (0, longest - len(own))))
    return [row[:n].numpy().tobytes().decode() for row, n in zip(found, lengths, strict=True)]


def _text(text: str) -> str:
    """Rank 0's text, which may take it long to have."""
    own = _letters(text)
    length = torch.tensor(len(own))
    dist.broadcast(length, 0, group=_patient)
    own = own if is_first() else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(own, 0, group=_patient)
    return own.numpy().tobytes().decode()


def _letters(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
