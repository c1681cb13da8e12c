"""The public names of the package: all there, loaded on first use, stages callable however they were imported."""

import subprocess
import sys

import pytest

import flextron


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", flextron.__all__)
def test_public_name_is_there_and_callable(name):
    assert callable(getattr(flextron, name))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        _ = flextron.prune


def test_importing_the_package_loads_neither_torch_nor_transformers():
    loaded = run("import sys, flextron, flextron.cli; print({'torch', 'transformers'} & set(sys.modules))")
    assert loaded == "set()"


@pytest.mark.parametrize(
    "first",
    [
        "import flextron",
        "import flextron.pipeline",
        "from flextron.conversion import score",
        "import flextron; flextron.convert",
    ],
)
def test_a_stage_is_a_function_whatever_was_imported_first(first):
    code = f"""
{first}
import flextron, flextron.conversion
assert flextron.conversion.score and flextron.convert is flextron.pipeline.convert
try:
    flextron.convert("nowhere/", "also-nowhere/", samples=1)
except Exception as error:
    print(type(error).__name__)
"""
    assert run(code) == "CheckpointError"
