"""The processes that torchrun started for one command: joining them, and what they agree on, share and average.

A process that torchrun did not start is alone: everything here works, and does nothing. Messages between processes are
JSON and tensors; nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flextron.sentences import first_line, listed

T = TypeVar("T")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT = 600.0  # seconds that a rank waits for the others, to join and in every exchange


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


class LostError(ConnectionError):
    """The ranks cannot be joined, or one of them is gone."""


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
def joined(who: str, device: str = "auto") -> Iterator[Ranks]:
    """Join the ranks that torchrun started for this command, and leave them at the end of the ``with`` block.

    Messages on the CPU go through gloo, those of GPU tensors through NCCL. Where torchrun did not start this
    process, it is `ALONE`. Where the ranks are joined already, by a caller or by a script, nothing is done again.

    Args:
        who: begins the message.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``; every rank takes the GPU of its local rank, if there are GPUs.

    Raises:
        ValueError: the environment is not torchrun's, or the device cannot be had.
        LostError: the ranks cannot reach each other, or lose each other inside the ``with`` block.
    """
    global _now
    if _now is not ALONE or not ("RANK" in os.environ or "WORLD_SIZE" in os.environ):
        yield _now
        return
    rank, size, local = _numbers(who)
    own = not dist.is_initialized()
    place = _device(who, device, local)
    if own:
        _connect(who, rank, size, place)
    _now = Ranks(rank, size, local, place)
    try:
        yield _now
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise LostError(
            f"{who}: all {size} processes must stay alive, got {_reason(error)}; start the same command again to "
            "resume from the last checkpoint"
        ) from error
    finally:
        _now = ALONE
        if own:
            dist.destroy_process_group()


def agree(who: str, facts: Mapping[str, Any]) -> None:
    """Raise ValueError on every rank, in one sentence, unless all ranks have the same facts (JSON values)."""
    texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
    found = [json.loads(text) for text in _texts(json.dumps(texts))]
    names = dict.fromkeys(name for other in found for name in other)
    for name in names:
        values = [other.get(name, "nothing") for other in found]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"{who}: {name} must be the same on all {len(found)} processes, got {_short(values[0])} on rank 0 and "
                f"{_short(values[other])} on rank {other}"
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


def mean(tensor: Tensor, weight: float = 1.0) -> Tensor:
    """The mean over the ranks' tensors, of the same shape and dtype everywhere, by the weights of the ranks."""
    if _now.size == 1:
        return tensor
    total = torch.tensor(weight, dtype=torch.float64)
    dist.all_reduce(total)
    found = tensor * weight
    dist.all_reduce(found)
    return found / float(total)


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


def _device(who: str, device: str, local: int) -> torch.device:
    """The device of a rank, where ``device`` can be had there."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"{who}: device must be auto, cpu or cuda when torchrun runs it (each rank has the GPU of its "
            f"local rank), got {device}"
        )
    gpus = torch.cuda.device_count()
    if device == "cuda" and not gpus:
        raise ValueError(f"{who}: device must be one that this machine has, got cuda and no GPU")
    if device == "cpu" or not gpus:
        return torch.device("cpu")
    if local >= gpus:
        raise ValueError(
            f"{who}: --nproc-per-node must be at most the {gpus} GPUs of this machine, got local rank {local}"
        )
    if not dist.is_nccl_available():
        raise ValueError(
            f"{who}: torch must have NCCL for GPUs in several processes, got a torch without it; give --device cpu"
        )
    return torch.device("cuda", local)


def _connect(who: str, rank: int, size: int, device: torch.device) -> None:
    limit = timedelta(seconds=_seconds(who))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=limit,
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, OSError) as error:  # torch's DistError among them
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise LostError(
                f"{who}: port {os.environ['MASTER_PORT']} must be free, got one that another program listens on; "
                "give torchrun another --master-port, or --standalone"
            ) from None
        raise LostError(
            f"{who}: all {size} processes must reach {place} within {limit.total_seconds():.0f} s, "
            f"got {first_line(error)}"
        ) from None


def _seconds(who: str) -> float:
    given = os.environ.get("FLEXTRON_RANKS_TIMEOUT", str(_TIMEOUT))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(f"{who}: FLEXTRON_RANKS_TIMEOUT must be a number of seconds, got {given}")
    return seconds


def _is_lost(error: RuntimeError) -> bool:
    """Whether an exchange between ranks failed. gloo has no error class of its own."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _reason(error: RuntimeError) -> str:
    return "one that does not answer" if "imed out" in str(error) else "one gone"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def _texts(text: str) -> list[str]:
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
    """Rank 0's text."""
    own = _letters(text)
    length = torch.tensor(len(own))
    dist.broadcast(length, 0)
    own = own if is_first() else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(own, 0)
    return own.numpy().tobytes().decode()


def _letters(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
