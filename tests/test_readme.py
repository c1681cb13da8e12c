"""What README.md promises first: it is short, says how to install, and its example runs as it stands."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example():
    block = re.search(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert block, "README.md must hold a python example"
    return block.group(1)


def test_it_is_short():
    assert len(README.splitlines()) <= 90


def test_it_holds_the_install_command_with_its_requirements():
    assert "pip install" in README
    assert re.search(r"Python\D*3\.11", README) and re.search(r"C\+\+", README)


def test_it_shows_the_two_commands_and_two_pictures():
    assert re.findall(r"^make (demo|test) +#", README, re.MULTILINE) == ["demo", "test"]
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 2
    assert all((ROOT / picture).stat().st_size < 100_000 for picture in pictures)


def test_example_runs(tmp_path, monkeypatch):
    from flextron_lab.demo import tiny
    from flextron_lab.demo.parents import load_parent

    monkeypatch.setattr(tiny, "STEPS", 20)
    calls = [node for node in ast.walk(ast.parse(example())) if isinstance(node, ast.Call)]
    converted = [ast.literal_eval(c.args[0]) for c in calls if ast.unparse(c.func) == "flextron.convert"]
    for name in converted:  # a small model in a directory of that name stands in for the hub's
        load_parent("tiny", out_dir=tmp_path / name)
    brief = (
        "from flextron.routing import profile\nprofile.PATIENCE = 0.0\n"  # whatever else this machine does
    )
    run = subprocess.run(
        [sys.executable, "-c", brief + example()],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
