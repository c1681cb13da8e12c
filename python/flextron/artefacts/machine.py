"""The machine that a latency holds for: a device, a dtype and, on a CPU, its threads; and its name as a file's.

Facts are a dictionary. Those of `DEVICE` say what computes, those of `USE` how it is used; together they make the
machine. Versions of torch and flextron are told, but do not.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # a benchmark of ops asks for the processor, where transformers may not be there
    from flextron.nn.protocol import Elastic

DEVICE, USE = ("device", "instructions"), ("threads", "dtype")
IDENTITY = (*DEVICE, *USE)
_INSTRUCTIONS = (
    ("avx2", "AVX2"),
    ("avx512f", "AVX-512"),
    ("avx512_bf16", "AVX512-BF16"),
    ("amx_tile", "AMX"),
)

Machine = Mapping[str, Any]


def machine_of(model: Elastic) -> dict[str, Any]:
    """The machine that ``model`` is on now."""
    weight = model.get_input_embeddings().weight
    return machine_on(weight.device, weight.dtype)


def machine_on(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The machine of a model on ``device`` whose weights are of ``dtype``.

    Processors of several kinds share a name like "AMD EPYC", so their instruction sets count. Threads count on a CPU
    alone: on a GPU the host only launches.
    """
    if device.type == "cuda":
        facts: dict[str, Any] = {"device": torch.cuda.get_device_name(device)}
    else:
        name, sets = _cpu()
        facts = {"device": name, "instructions": ", ".join(sets), "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "flextron": _version()}
    return facts | {"dtype": str(dtype).removeprefix("torch.")} | versions


def is_same(one: Machine, other: Machine, facts: Iterable[str] = IDENTITY) -> bool:
    """Whether two records are of one machine; a fact that an older record lacks is taken for equal."""
    return all(one[fact] == other[fact] for fact in facts if fact in one and fact in other)


def name_of(machine: Machine) -> str:
    """The machine's name, which ``machine=`` takes and its file bears.

    ``nvidia-h200-bfloat16`` or ``amd-epyc-avx-512-2-threads-float32``.
    """
    facts = [
        f"{machine[fact]} threads" if fact == "threads" else str(machine[fact])
        for fact in IDENTITY
        if machine.get(fact)
    ]
    plain = re.sub(r"\((?:r|tm|c)\)", " ", " ".join(facts).lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


def processor() -> str:
    """This machine's processor and its widest instruction sets."""
    name, sets = _cpu()
    return ", ".join([name, *sets])


def caches() -> dict[str, str]:
    """The caches of the first core, as Linux lists them: {"L1d": "32K", "L2": "1024K"}; nothing where it does not."""
    sizes = {}
    for cache_ in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((cache_ / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        sizes[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return sizes


@cache
def _cpu() -> tuple[str, tuple[str, ...]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ()
    return _cpu_of(lines)


def _cpu_of(lines: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    pairs = (line.partition(":") for line in lines if ":" in line)
    facts = {name.strip(): fact.strip() for name, _, fact in pairs}
    flags = facts.get("flags", "").split()
    sets = [word for flag, word in _INSTRUCTIONS if flag in flags]
    if "AVX-512" in sets:
        sets.remove("AVX2")
    return facts.get("model name", f"{platform.machine()} CPU"), tuple(sets)


@cache
def _version() -> str:
    return metadata.version("flextron")
