"""What ``flextron --version`` prints."""

from __future__ import annotations

import os

from flextron.sentences import first_line


def installed() -> tuple[str, str]:
    """A line of versions, and a line on what the ops were built for and which instruction set they use here."""
    import platform
    from importlib.metadata import version

    import torch

    versions = (
        f"flextron {version('flextron')}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    try:
        from flextron_ext import build_info
    except ImportError as error:
        return versions, f"ops: {first_line(error)}"
    info = build_info()
    here = os.environ.get("FLEXTRON_ISA") or (
        "amx"
        if torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()
        else "avx512_bf16"
        if torch.cpu._is_avx512_bf16_supported()
        else "avx512_vnni"
        if torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported()
        else "avx512"
        if torch.cpu._is_avx512_supported()
        else "avx2"
        if torch.cpu._is_avx2_supported()
        else "baseline"
    )
    cuda = ", ".join(info["cuda_archs"]) or "none"
    return (
        versions,
        f"ops: CPU {', '.join(info['isas'])} (here {here}), CUDA {cuda}, compiler {info['compiler']}",
    )
