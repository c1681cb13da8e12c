"""What the data sheets say of the GPUs that models are trained on: memory, arithmetic, links. No torch here.

Sources: NVIDIA's data sheets of A100 (1758950-r4), H100 (nvidia-tensor-core-gpu-datasheet) and H200
(nvidia.com/data-center/h200), and the user guides of DGX A100 and DGX H100 for what leaves a node.
"""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 1 << 30
_TERA = 10**12
_GIGA = 10**9


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: as it is written in tables and typed in commands.
        words: what the name that CUDA reports must contain.
        memory: bytes that torch reports, rounded down to a GiB: a part of the "80 GB" is the driver's.
        bf16_flops: bfloat16 tensor operations a second with float32 sums, dense (data sheets also give twice as many,
            which count zeros).
        bandwidth: bytes a second from and to the memory.
        link: bytes a second to the GPUs of the same node, in one direction: NVLink; PCIe for cards.
        network: bytes a second to other nodes, in one direction: one InfiniBand adapter for each GPU.
    """

    name: str
    words: tuple[str, ...]
    memory: int
    bf16_flops: float
    bandwidth: float
    link: float
    network: float


# The first row that matches is the one: variants come before the name that they share.
DEVICES = (
    Device("h200", ("H200",), 139 * _GIB, 989 * _TERA, 4800 * _GIGA, 450 * _GIGA, 50 * _GIGA),
    Device("h100-pcie", ("H100", "PCIe"), 79 * _GIB, 756 * _TERA, 2000 * _GIGA, 64 * _GIGA, 50 * _GIGA),
    Device("h100-nvl", ("H100", "NVL"), 93 * _GIB, 835 * _TERA, 3900 * _GIGA, 300 * _GIGA, 50 * _GIGA),
    Device("h100", ("H100",), 79 * _GIB, 989 * _TERA, 3350 * _GIGA, 450 * _GIGA, 50 * _GIGA),
    Device("a100-40", ("A100", "40GB"), 39 * _GIB, 312 * _TERA, 1555 * _GIGA, 300 * _GIGA, 25 * _GIGA),
    Device("a100-pcie", ("A100", "PCIe"), 79 * _GIB, 312 * _TERA, 1935 * _GIGA, 32 * _GIGA, 25 * _GIGA),
    Device("a100", ("A100",), 79 * _GIB, 312 * _TERA, 2039 * _GIGA, 300 * _GIGA, 25 * _GIGA),
)


def known(reported: str) -> Device | None:
    """The device that calls itself so (``torch.cuda.get_device_name()``); None where no row is about it."""
    return next((d for d in DEVICES if all(word in reported for word in d.words)), None)
