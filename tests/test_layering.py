"""Who may know whom: reads every include and import line and fails on a wrong arrow."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each layer of csrc and the project folders or files its quoted includes may name.
CSRC = {
    "core": {"core"},
    "kernels": {"core", "kernels"},
    "kernels/device": {"core", "kernels", "emulator"},  # each instruction's two bodies
    "ops": {"core", "kernels", "ops"},
    "library.cpp": {"core", "ops/ops.h"},
    "bindings.cpp": {"core"},
}
# Libraries that only some layers may see; the C++ standard library is everybody's.
LIBRARIES = {
    "torch/csrc/stable/": {"ops", "library.cpp"},
    "torch/csrc/inductor/aoti_torch/c/": {"ops"},  # the C face of the same stable ABI: devices and streams
    "torch/headeronly/": {"ops", "kernels", "library.cpp"},
    "torch/": set(),
    "ATen/": set(),
    "c10/": set(),
    "pybind11/": {"bindings.cpp"},
    "Python.h": set(),
    "cuda": {"core", "kernels", "ops"},
    "mma.h": {"kernels"},
    "immintrin.h": {"core", "kernels"},
}

# Each Python layer and the layers of ours it may import; a module directly in flextron is a layer of its own.
STAGES = {
    *("flextron.artefacts", "flextron.judge", "flextron.nn"),
    *("flextron.config", "flextron.recipes", "flextron.data", "flextron.checkpoint", "flextron.ui"),
    *("flextron.sentences", "flextron.devices", "flextron.ranks", "flextron.scale"),
}
EVERYTHING = "everything of the library"
PYTHON = {
    "flextron_ext": {"flextron_ext"},
    "flextron.config": set(),
    "flextron.recipes": {"flextron.config"},
    "flextron.sentences": set(),
    "flextron.devices": set(),
    "flextron.documents": {"flextron.documents", "flextron.sentences"},
    "flextron.data": {"flextron.documents"},
    "flextron.tokens": {
        *(
            "flextron.tokens",
            "flextron.documents",
            "flextron.data",
            "flextron.checkpoint",
            "flextron.sentences",
        ),
    },
    "flextron.ui": set(),
    "flextron.ranks": {"flextron.ranks", "flextron.sentences"},
    "flextron.scale": {"flextron.scale", "flextron.config", "flextron.recipes", "flextron.devices"},
    "flextron.testing": {"flextron.testing"},
    "flextron.checkpoint": {"flextron.checkpoint", "flextron.config", "flextron.sentences"},
    "flextron.nn": {"flextron.nn", "flextron.config", "flextron.sentences", "flextron_ext"},
    "flextron.artefacts": {
        *("flextron.artefacts", "flextron.nn", "flextron.checkpoint"),
        *("flextron.config", "flextron.recipes", "flextron.sentences", "flextron.ranks"),
    },
    "flextron.inference": {"flextron.artefacts", "flextron.nn", "flextron.checkpoint", "flextron.config"},
    "flextron.serving": {
        *("flextron.serving", "flextron.artefacts", "flextron.nn", "flextron.checkpoint", "flextron.config"),
    },
    "flextron.sampling": {"flextron.nn", "flextron.data", "flextron.checkpoint"},
    "flextron.corpus": {"flextron.tokens", "flextron.data", "flextron.config", "flextron.ranks"},
    "flextron.own_text": {"flextron.corpus", "flextron.data"},
    "flextron.judge": {
        *("flextron.judge", "flextron.artefacts", "flextron.nn"),
        *("flextron.config", "flextron.ranks"),
    },
    "flextron.conversion": {"flextron.conversion", *STAGES},
    "flextron.training": {"flextron.training", *STAGES},
    "flextron.routing": {"flextron.routing", *STAGES},
    "flextron.tuning": {"flextron.training", "flextron.routing", *STAGES},  # both learn at once
    "flextron.exporting": {"flextron.exporting", *STAGES},
    "flextron.pipeline": EVERYTHING,  # the stages in a row
    "flextron.cli": EVERYTHING,
    "flextron.__main__": EVERYTHING,
    "flextron": EVERYTHING,  # the public names, listed
    "flextron_lab": EVERYTHING,
}
MAY_IMPORT_THE_LAB = {"flextron_lab"}


def circle(layers: dict[str, object]) -> list[str]:
    """Layers that may import each other, the first one again at the end; none where there is an order of them."""
    arrows = {name: may - {name} for name, may in layers.items() if may != EVERYTHING}
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def wrong_includes(file: str, text: str) -> list[str]:
    """The include lines of ``file`` (a path inside csrc) that its layer may not have."""
    layer = max((name for name in CSRC if f"{file}/".startswith(f"{name}/")), key=len, default=None)
    if layer is None:
        return [f"{file}: no layer of this name"]
    wrong = []
    for quote, name in re.findall(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)', text, re.MULTILINE):
        if quote == '"' or name.split("/")[0] in {*CSRC, "emulator"}:
            allowed = any(name == may or name.startswith(may + "/") for may in CSRC[layer])
        else:
            prefix = next((p for p in LIBRARIES if name.startswith(p)), None)
            allowed = prefix is None or layer.split("/")[0] in LIBRARIES[prefix]
        if not allowed:
            wrong.append(f"{file} may not include {name}")
    return wrong


def wrong_imports(module: str, text: str, is_package: bool = False) -> list[str]:
    """The import lines of ``module`` (a dotted name) that its layer may not have."""
    layer = layer_of(module)
    if layer not in PYTHON:
        return [f"{module}: no layer of this name"]
    nodes = list(ast.walk(ast.parse(text)))
    found = (name for node in nodes for name in imported(node, module, is_package))
    wrong = [f"{module} may not import {name}" for name in found if not may_import(layer, name)]
    free = layer == "flextron_ext" or PYTHON[layer] == EVERYTHING
    if not free and any(ast.unparse(n) == "torch.ops.flextron" for n in nodes if is_chain(n)):
        wrong.append(f"{module} may not call torch.ops.flextron")
    return wrong


def is_chain(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "flextron"


def may_import(layer: str, name: str) -> bool:
    first = name.split(".")[0]
    if first == "flextron_lab":
        return layer in MAY_IMPORT_THE_LAB
    if first in ("flextron", "flextron_ext", "tests", "benchmarks"):
        if PYTHON[layer] == EVERYTHING:
            return first in ("flextron", "flextron_ext")
        return layer_of(name) in PYTHON[layer]
    # A user who wants only the ops needs torch and nothing else.
    return layer != "flextron_ext" or first == "torch" or first in sys.stdlib_module_names


def layer_of(module: str) -> str:
    """flextron.routing.profile -> flextron.routing; flextron_ext.ops.route -> flextron_ext."""
    first, *rest = module.split(".")
    return f"{first}.{rest[0]}" if first == "flextron" and rest else first


def imported(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """The modules an import statement names; ``from flextron import nn`` names flextron.nn."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module.split(".")[: len(module.split(".")) - node.level + is_package]
        base = ".".join([*package, base] if base else package)
    return [f"flextron.{alias.name}" for alias in node.names] if base == "flextron" else [base]


def python_modules():
    for root in (ROOT / "flextron_ext", ROOT / "python" / "flextron", ROOT / "python" / "flextron_lab"):
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root.parent).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            yield ".".join(parts[:-1] if is_package else parts), file, is_package


def csrc_files():
    return sorted(f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".h", ".cpp", ".cu", ".cuh"))


def test_no_include_points_the_wrong_way():
    files = csrc_files()
    assert files
    wrong = [w for f in files for w in wrong_includes(f.relative_to(ROOT / "csrc").as_posix(), f.read_text())]
    assert not wrong, "\n".join(wrong)


def test_the_layers_have_no_circle():
    assert not circle(PYTHON)
    assert len(circle(PYTHON | {"flextron.artefacts": {"flextron.judge"}})) == 3


def test_no_import_points_the_wrong_way():
    modules = list(python_modules())
    assert {"flextron", "flextron_ext", "flextron_lab"} <= {layer_of(name) for name, _, _ in modules}
    wrong = [w for name, file, package in modules for w in wrong_imports(name, file.read_text(), package)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/math.h", '#include "kernels/route.h"'),
        ("core/math.h", "#include <torch/headeronly/core/ScalarType.h>"),
        ("kernels/route_cuda.cu", "#include <torch/csrc/stable/tensor.h>"),
        ("kernels/route_cuda.cu", "#include <ATen/ATen.h>"),
        ("kernels/route.h", '#include "ops/checks.h"'),
        ("kernels/device/copy.cuh", '  #  include "ops/ops.h"'),
        ("kernels/route_cuda.cu", '#include "emulator/emulator.h"'),
        ("kernels/route.h", "#include <ops/checks.h>"),
        ("ops/route.cpp", "#include <torch/extension.h>"),
        ("ops/route.cpp", "#include <pybind11/pybind11.h>"),
        ("ops/route.cpp", '#include "bindings.h"'),
        ("library.cpp", '#include "kernels/route.h"'),
        ("bindings.cpp", '#include "ops/ops.h"'),
        ("bindings.cpp", "#include <torch/csrc/stable/tensor.h>"),
        ("helpers/misc.h", ""),
    ],
)
def test_a_planted_include_is_caught(file, line):
    assert len(wrong_includes(file, f"#include <vector>\n{line}\n")) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("flextron_ext.ops.route", "from flextron.config import Widths"),
        ("flextron_ext.ops.route", "import flextron"),
        ("flextron_ext.ops.route", "import transformers"),
        ("flextron.config", "import flextron_ext"),
        ("flextron.data", "from flextron.config import Widths"),
        ("flextron.checkpoint.io", "from flextron.nn import make_elastic"),
        ("flextron.nn.model", "from flextron.checkpoint import load"),
        ("flextron.nn.model", "import flextron.routing.static"),
        ("flextron.nn.model", "from flextron.judge.loss import evaluate"),
        ("flextron.judge.loss", "from flextron.training import train"),
        ("flextron.artefacts.planner", "from flextron.judge.latency import measure"),
        ("flextron.artefacts.static_router", "from flextron.routing.static import train_routers"),
        ("flextron.routing.static", "from flextron.training.loop import train"),
        ("flextron.training.loop", "from flextron import tuning"),
        ("flextron.inference", "from flextron.pipeline import train"),
        ("flextron.judge.timing", "from flextron.testing import numerics"),
        ("flextron.conversion.reorder", "from flextron.training.loop import train"),
        ("flextron.training.loop", "from flextron import routing"),
        ("flextron.training.loop", "from ..routing import static"),
        ("flextron.routing.profile", "def f():\n    from flextron.exporting import extract"),
        ("flextron.exporting.plain", "from flextron.cli import main"),
        ("flextron.exporting.plain", "from tests.cases import CASES"),
        ("flextron.training.loop", "from flextron_ext import elastic_mlp"),
        ("flextron.training.loop", "torch.ops.flextron.route(logits)"),
        ("flextron.pipeline", "def f():\n    from flextron_lab.demo import stories"),
        ("flextron.nn.model", "import flextron_lab"),
        ("flextron.cli.eval", "def f():\n    from flextron_lab import tasks"),
        ("flextron_lab.demo.run", "from tests.cases import CASES"),
        ("flextron.helpers", ""),
    ],
)
def test_a_planted_import_is_caught(module, line):
    assert len(wrong_imports(module, f"import torch\n{line}\n")) == 1


def test_right_arrows_pass():
    assert not wrong_includes(
        "ops/route.cpp", '#include "kernels/route.h"\n#include <torch/csrc/stable/tensor.h>'
    )
    device = '#include "emulator/emulator.h"\n#include <cuda_runtime.h>'
    assert not wrong_includes("kernels/device/instruction.cuh", device)
    assert not wrong_imports("flextron.nn", "from .model import make_elastic", is_package=True)
    assert not wrong_imports(
        "flextron.training.loop", "from .losses import distillation\nfrom ..nn import Dial"
    )


def without_comments(text: str) -> str:
    return re.sub(r"//.*|/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.DOTALL)


def two_worlds(file: str, text: str) -> list[str]:
    """Where a kernel (a path inside csrc/kernels) knows whether a GPU or the emulator runs it."""
    if file.startswith("device/"):
        return []
    wrong = []
    code = without_comments(text)
    for condition in re.findall(r"^[ \t]*#[ \t]*(?:el)?if(?:n?def)?\b(.*)", code, re.MULTILINE):
        if Path(file).suffix in (".cu", ".cuh") or condition.strip() not in HOST_CONDITIONS:
            wrong.append(f"{file} may not have #if{condition}: it belongs in csrc/kernels/device")
    words = r"\b__shared__\b|<<<" if file in HOST_WORDS else r"\basm\b|\b__asm__\b|\b__shared__\b|<<<"
    for word in re.findall(words, code):
        wrong.append(f"{file} may not have {word}: it belongs in csrc/kernels/device")
    return wrong


# What a file compiled for one instruction set of the host may ask.
HOST_CONDITIONS = {"__AVX2__", "__AVX512F__", "__AVX512BF16__", "__AMX_BF16__"}
# The words of the host's own matrix unit, with their emulated bodies.
HOST_WORDS = {"amx.h"}


def without_emulated_body(text: str) -> list[str]:
    """The functions of a file of csrc/kernels/device that have assembly and nothing for the emulator."""
    wrong = []
    for function in re.split(r"^(?=__device__|template|inline)", without_comments(text), flags=re.MULTILINE):
        emulated = "FLEXTRON_INSTRUCTION(" in function or "FLEXTRON_EMULATE" in function
        if re.search(r"\basm\b", function) and not emulated:
            wrong.append(function.strip().splitlines()[0])
    return wrong


def kernel_files():
    folder = ROOT / "csrc" / "kernels"
    return [(f.relative_to(folder).as_posix(), f.read_text()) for f in csrc_files() if folder in f.parents]


def test_kernels_are_the_same_on_a_gpu_and_in_the_emulator():
    wrong = [w for file, text in kernel_files() for w in two_worlds(file, text)]
    assert not wrong, "\n".join(wrong)


def test_every_instruction_has_an_emulated_body():
    device = [(file, text) for file, text in kernel_files() if file.startswith("device/")]
    assert sum(text.count("asm volatile") for _, text in device) > 10
    wrong = [f"device/{file}: {w}" for file, text in device for w in without_emulated_body(text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "#ifdef FLEXTRON_EMULATE",
        "  #  if __CUDA_ARCH__ >= 900",
        "#ifdef __AVX2__",
        'asm volatile("bar.sync 0;");',
        "kernel<<<1, 32>>>(p);",
        "extern __shared__ int count[];",
    ],
)
def test_a_planted_difference_is_caught(line):
    assert len(two_worlds("route_cuda.cu", f"#pragma once\nint x;\n{line}\n")) == 1


def test_a_planted_instruction_without_an_emulated_body_is_caught():
    real = '__device__ void {}() {{\n  asm volatile("nanosleep.u32 20;");\n}}\n'
    both = (
        '__device__ void f() {\n  FLEXTRON_INSTRUCTION(asm volatile("bar.sync 0;"), emulator::sync());\n}\n'
    )
    assert without_emulated_body(both + real.format("g") + both) == ["__device__ void g() {"]
    assert not without_emulated_body(both)


FORBIDDEN = {
    "a pickle": re.compile(
        r"^\s*(import|from)\s+(pickle|dill|joblib|cloudpickle)\b|\btorch\.(load|save)\(", re.MULTILINE
    ),
    "unfinished work": re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b"),
}
TEXTS = {".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", ".yaml", ".sh", ".txt"}
SKIPPED = {".git", ".venv", ".venv-hosts", "build", "dist", "demo-out"}


def project_files():
    for file in sorted(ROOT.rglob("*")):
        if (
            not SKIPPED & set(file.relative_to(ROOT).parts)
            and file.suffix in TEXTS
            and file != Path(__file__).resolve()
        ):
            yield file


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_tree_is_free_of(what):
    code = [
        f for f in project_files() if what != "a pickle" or (f.suffix == ".py" and "tests" not in f.parts)
    ]
    assert len(code) > 10
    found = [
        f"{f.relative_to(ROOT)}: {m.group()}" for f in code for m in FORBIDDEN[what].finditer(f.read_text())
    ]
    assert not found, "\n".join(found)


def test_forbidden_lines_are_recognised():
    pickle, unfinished = FORBIDDEN.values()
    assert pickle.search("import torch\nimport pickle\n") and pickle.search("x = torch.load(file)")
    assert not pickle.search("# never a pickle; safetensors.torch.load_file(x)")
    assert unfinished.search("# TO" + "DO: later")
