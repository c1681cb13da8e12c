"""What README.md and CONTRIBUTING.md promise is there: the example, the commands and the files they name."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flextron_ext import schemas

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = ["README.md", "CONTRIBUTING.md"]
FIRST_LINES = 30


def first_lines():
    return "\n".join(README.read_text(encoding="utf-8").splitlines()[:FIRST_LINES])


def example():
    block = re.search(r"^```python\n(.*?)^```$", first_lines(), re.MULTILINE | re.DOTALL)
    assert block, f"the first {FIRST_LINES} lines of README.md must hold a whole python example"
    return block.group(1)


def code_of(page):
    """The lines of the fenced blocks that are not Python, and the inline code, of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for kind, block in blocks if kind != "python" for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", prose)


def subcommands(code):
    return {m.group(1) for line in code if (m := re.match(r"(?:\$ )?flextron ([a-z]+)\b", line))}


def make_targets(code):
    return {m for line in code for m in re.findall(r"\bmake ([a-z]+)\b", line)}


def environment():
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        "HF_HUB_OFFLINE": "1",
    }


def test_first_lines_hold_the_install_command_with_its_requirements():
    assert "pip install" in first_lines()
    assert re.search(r"Python\D*3\.11", first_lines()) and re.search(r"C\+\+", first_lines())


def test_the_page_of_ops_lists_every_op():
    page = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\|(\s*`\w+`[^|]*)\|", page, re.MULTILINE)
    rows = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    ops = {schema.split("(")[0].removeprefix("flextron::") for schema in schemas()}
    assert rows == {op for op in ops if not op.endswith("_backward")}


def test_example_runs(tmp_path, monkeypatch):
    from flextron_lab.demo import tiny
    from flextron_lab.demo.parents import load_parent

    monkeypatch.setattr(tiny, "STEPS", 20)
    calls = [node for node in ast.walk(ast.parse(example())) if isinstance(node, ast.Call)]
    converted = [ast.literal_eval(c.args[0]) for c in calls if ast.unparse(c.func) == "flextron.convert"]
    for name in converted:  # a small model stands where the example says that a model is
        load_parent("tiny", out_dir=tmp_path / name)
    run = subprocess.run(
        [sys.executable, "-c", example()],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_are_in_the_makefile(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    there = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = make_targets(code_of(page))
    assert {"demo", "test"} <= named <= there


def test_subcommands_named_in_the_readme_exist():
    run = subprocess.run(
        [sys.executable, "-m", "flextron.cli", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    named = subcommands(code_of("README.md"))
    assert "demo" in named
    there = set(re.findall(r"^ {4}([a-z]+)\b", run.stdout, re.MULTILINE))
    assert named <= there


@pytest.mark.parametrize("page", PAGES)
def test_files_named_by_a_page_exist(page):
    named = {
        c.split()[-1]
        for c in code_of(page)
        if re.fullmatch(r"(bash )?[\w./-]+/[\w.-]+\.(py|sh|h|cpp|cu|md|yaml)", c)
    }
    assert named or page == "README.md"
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{page} names {missing}"


def test_what_is_read_from_a_page_is_recognised():
    assert subcommands(["flextron convert SRC DST", "pip install flextron", "$ flextron demo"]) == {
        "convert",
        "demo",
    }
    assert make_targets(['make demo ARGS="--parent tiny"', "make"]) == {"demo"}
