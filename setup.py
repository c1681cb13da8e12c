"""Runs CMake and puts the binaries into flextron_ext/; every other fact is in pyproject.toml."""

import filecmp
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cmake"  # kept: the next build compiles only what changed


def find_torch() -> Path | None:
    """torch's folder: in this environment, or in the one that a build isolated from it was started in."""
    spec = importlib.util.find_spec("torch")
    found = Path(spec.submodule_search_locations[0]) if spec else Path(sysconfig.get_path("platlib"), "torch")
    return found if (found / "include" / "torch" / "csrc" / "stable" / "ops.h").is_file() else None


def kept_headers() -> Path:
    """A copy of pybind11's headers in the kept folder: an isolated build has new ones each time, in another place."""
    folder, kept = Path(pybind11.get_include()), BUILD / "pybind11"
    for header in folder.rglob("*.h"):
        copy = kept / header.relative_to(folder)
        if not copy.is_file() or not filecmp.cmp(header, copy, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(header, copy)
    return kept


def cuda_archs() -> str:
    """The GPU architectures to compile for: as asked for, else those of this machine's GPUs, else what most have."""
    asked = os.environ.get("FLEXTRON_CUDA_ARCHS", "native")
    if asked != "native":
        return asked
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True).stdout
    except OSError:  # no driver
        answer = ""
    found = {
        int(major) * 10 + int(minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", answer, re.MULTILINE)
    }
    # 90a has the instructions of Hopper's kernels; what is older than 80 has too few for any of them.
    return ";".join("90a" if arch == 90 else str(arch) for arch in sorted(found) if arch >= 80) or "80;90a"


class CMakeBuild(build_ext):
    """The one extension: the op library and its pybind11 face, both built by CMake."""

    def run(self) -> None:
        root = ROOT if self.inplace else Path(self.build_lib).resolve()
        torch_dir = find_torch()
        if torch_dir is None:
            raise SystemExit(
                "flextron: torch 2.10 or newer must be installed first, got none or an older one"
            )
        includes = [sysconfig.get_path("include"), str(kept_headers())]
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
            "FLEXTRON_VERSION": self.distribution.get_version(),
            "FLEXTRON_TORCH_DIR": torch_dir,
            "FLEXTRON_PYTHON_INCLUDES": ";".join(includes),
            "FLEXTRON_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "FLEXTRON_OUTPUT_DIR": root / "flextron_ext",
            "FLEXTRON_CUDA": os.environ.get("FLEXTRON_CUDA", "AUTO"),
            "FLEXTRON_CUDA_ARCHS": cuda_archs(),
        }
        program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run([program, "-G", "Ninja", "-S", ROOT, "-B", BUILD, *defines], check=True)
        subprocess.run([program, "--build", BUILD], check=True)


# An isolated build asks for a torch of its own only where there is none: its headers are all that is needed, any
# version's will do, and a fresh one brings gigabytes.
setup(
    ext_modules=[Extension("flextron_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[] if find_torch() else ["torch>=2.10"],
)
