"""A command in one process, or in several that torchrun started: rank 0 prints for all."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextron.cli.discovery import Command

if TYPE_CHECKING:
    import torch

IN_SEVERAL = "convert, train, tune, eval and route --adaptive"
_RESUMED = ("train", "tune")


def is_started() -> bool:
    """Whether torchrun started this process; told without torch, which takes seconds to import."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def is_silent() -> bool:
    """Whether what every process finds wrong by itself is another's to say: one of each machine says it."""
    return is_started() and os.environ.get("LOCAL_RANK", "0") != "0"


def tell_torchrun(sentence: str) -> None:
    """Let torchrun's own report, which comes last and is long, name the sentence as the cause."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}))


def run(command: Command, args: Namespace) -> Any:
    """What the command returns."""
    if not is_started():
        return command.run(args)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its errors reach us as exceptions, too
    from flextron import ranks

    again = "start the same command again" + " to resume from the last checkpoint" * (
        args.command in _RESUMED
    )
    with ranks.joined(args.command, partial(_device, args), again) as me:
        if me.size > 1:
            _check(args, me.size)
        with contextlib.nullcontext() if ranks.is_first() else _quiet():
            return command.run(args)


def _device(args: Namespace) -> torch.device:
    """The device of this process."""
    from flextron.nn.placement import one_device

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the command says it again, once for all
        return one_device(args.command, getattr(args, "device", "auto"))


def _check(args: Namespace, size: int) -> None:
    """Refuse a command that runs in one process, and processes that were not started alike."""
    from flextron import ranks
    from flextron.cli.version import installed

    ranks.agree(args.command, {"versions": installed()[0], **vars(args)})
    static = args.command == "route" and not args.adaptive
    if args.command not in IN_SEVERAL or static or getattr(args, "tasks", None):
        what = "route without --adaptive" if static else args.command
        what += " --tasks" * (getattr(args, "tasks", None) is not None)
        raise ValueError(
            f"{args.command}: processes must be 1 for {what}, got {size}; torchrun is for {IN_SEVERAL}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Print nothing; an error that leaves the ``with`` block is not printed in it."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
