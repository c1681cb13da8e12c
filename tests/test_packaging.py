"""What is installed: one version, an op library that loads alone, nothing of torch's unstable ABI."""

import re
import runpy
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

import flextron_ext
from flextron_ext import _C

ROOT = Path(__file__).resolve().parent.parent


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_written_once():
    assert flextron_ext.build_info()["version"] == project()["version"] == metadata.version("flextron")


def test_build_info_says_what_was_built():
    info = flextron_ext.build_info()
    assert set(info) == {"version", "compiler", "isas", "cuda", "cuda_archs"}
    assert "baseline" in info["isas"]
    assert info["cuda"] == bool(info["cuda_archs"])


def test_the_workshops_commands_are_installed_as_they_are_declared():
    installed = {e.name: e.value for e in metadata.entry_points(group="flextron.commands")}
    assert installed == project()["entry-points"]["flextron.commands"], "stale: run `make setup`"


def test_schemas_are_those_torch_knows():
    for schema in flextron_ext.schemas():
        name = schema.split("(")[0]
        assert str(getattr(torch.ops.flextron, name).default._schema) == f"flextron::{schema}"


def test_the_op_library_loads_alone():
    program = (
        "import sys, torch\n"
        f"torch.ops.load_library({flextron_ext.OP_LIBRARY!r})\n"
        "x = torch.arange(6.0).view(2, 3)\n"
        "y = torch.ops.flextron.elastic_linear(x, torch.eye(3), None, 3, 2)\n"
        "assert y.tolist() == [[0.0, 1.0], [3.0, 4.0]], y\n"
        "assert 'flextron_ext' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_op_of_the_library_is_right_without_our_python():
    check = Path(__file__).with_name("check_library.py")
    done = subprocess.run(
        [sys.executable, str(check), flextron_ext.OP_LIBRARY], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def needed(binary: str) -> set[str]:
    # The dynamic section's strings: sonames stand there in clear.
    return {
        name.decode() for name in re.findall(rb"lib[A-Za-z0-9_+-]+\.so[.0-9]*", Path(binary).read_bytes())
    }


def test_the_op_library_needs_neither_python_nor_a_cuda_runtime():
    names = needed(flextron_ext.OP_LIBRARY)
    assert {"libtorch_cpu.so", "libc10.so"} <= names
    assert not any(name.startswith(("libpython", "libtorch_python", "libcudart")) for name in names)
    assert "libflextron.so" in needed(_C.__file__)


def test_no_file_uses_the_unstable_abi():
    for path in (*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.c*")):
        for line in path.read_text().splitlines():
            if line.startswith("#include <"):
                assert not line.startswith(
                    ("#include <torch/extension", "#include <ATen", "#include <c10")
                ), path


# What nvidia-smi prints, and what is compiled then; None: there is no nvidia-smi.
ARCHS = {
    "9.0\n9.0\n": "90a",
    "8.6\n": "86",
    "9.0\n8.0\n": "80;90a",
    "10.0\n12.0\n": "100;120",
    "7.5\n9.0\n": "90a",
    "7.5\n": "80;90a",
    "No devices were found\n": "80;90a",
    None: "80;90a",
}


@pytest.fixture
def cuda_archs(monkeypatch, tmp_path):
    """setup.py's function; nvidia-smi is what a test puts into tmp_path."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("FLEXTRON_CUDA_ARCHS", raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))["cuda_archs"]


@pytest.mark.parametrize("answer", ARCHS, ids=lambda answer: answer and answer.strip())
def test_cuda_kernels_are_compiled_for_the_gpus_there_are(answer, cuda_archs, tmp_path, monkeypatch):
    if answer is not None:
        smi = tmp_path / "nvidia-smi"
        smi.write_text(
            f"#!{sys.executable}\nimport sys\n"
            "assert sys.argv[1:] == ['--query-gpu=compute_cap', '--format=csv,noheader']\n"
            f"print({answer!r}, end='')\n"
        )
        smi.chmod(0o755)
    assert cuda_archs() == ARCHS[answer]
    monkeypatch.setenv("FLEXTRON_CUDA_ARCHS", "native")
    assert cuda_archs() == ARCHS[answer]
    monkeypatch.setenv("FLEXTRON_CUDA_ARCHS", "80;86")
    assert cuda_archs() == "80;86"


def test_a_missing_binary_is_one_clear_sentence(tmp_path):
    package = tmp_path / "flextron_ext"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "flextron_ext" / "__init__.py").read_text())
    program = (
        "import sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import flextron_ext\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert "flextron_ext: the op library must be built first: run `pip install .`" in done.stderr
