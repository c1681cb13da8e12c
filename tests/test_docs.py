"""The pages tell the truth: their commands run or parse, their links lead somewhere, their listings are the code's."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import cli_page
import families_page
import pytest
import test_layering

from flextron.cli.discovery import commands
from flextron.cli.parser import parser_of
from flextron_ext import schemas

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        ROOT / "python/studies/README.md",
        ROOT / "tests/emulator/README.md",
    )
    if page.name != "CHANGELOG.md"
)
each_page = pytest.mark.parametrize("page", PAGES)

LANGUAGES = {"bash", "text", "python", "cpp"}  # text: drawings, formulas and output
PROGRAMS = ("flextron", "torchrun", "make", "python", "pytest", "bash", "pip", "git", "pre-commit", "nvcc")

# Why a command is not run here, though its arguments are parsed and its files are looked up; the first row that
# matches. Commands that no row matches are run.
NOT_RUN = (
    (r"flextron (demo|reproduce)\b", "takes minutes: .ci/run and tests/lab run them on small parents"),
    (r"flextron serve\b", "becomes vLLM, which `make hosts` starts; tests/serving runs all but that"),
    (r"flextron \w+", "tests/test_cli.py runs every command on a small checkpoint"),
    (r"make (demo|test|emulate|lint|resources)\b", ".ci/run runs it"),
    (r"make hosts\b", "installs the hosts; tests/exporting runs what does not need them"),
    (r"make (sanitize|bench)\b", "takes up to an hour; its script's arguments are tested"),
    (r"pip install\b", "make and .ci/run install and build, also in isolation"),
    (r"pytest\b", "it is a part of this suite"),
    (r"python tests/scale/measured\.py\b", "takes minutes; tests/scale counts smaller steps in the same way"),
    (
        r"python tests/peak\.py billion\b",
        "takes 5 GB and a minute; the suite measures 90 million parameters with it",
    ),
    (r"python tests/real_weights\.py\b", "takes minutes; tests/test_cli.py runs its stages on a small model"),
    (r"python tests/families_page\.py\b", "converts 33 models; tests/conversion/test_every_family.py does"),
    (
        r"python python/studies/disturbed\.py\b",
        "takes minutes and wants a quiet machine; tests/lab/test_disturbed.py runs it on a small model",
    ),
    (
        r"python python/studies/(oracle|rivals|ladders|benchmarks)\.py\b",
        "takes up to an hour; test_oracle.py, test_rivals.py and test_benchmarks.py of tests/lab run their parts",
    ),
    (r"python python/benchmarks/\w+\.py\b", "tests/test_bench*.py run them on small shapes"),
    (r"bash tests/two_torches\.sh\b", "downloads gigabytes; .ci/run does where it is asked to"),
    (r"pre-commit install\b", "changes the clone"),
    (r"nvcc\b", "needs CUDA's compiler; make resources runs it on every kernel"),
)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def fences(text):
    """(language, body) of each fenced block, indented ones too."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [(language, textwrap.dedent(body)) for _, language, body in found]


def prose(text):
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands_of(text):
    """What a reader may type: every line of the bash blocks, and inline code that begins with a program."""
    lines = [line for language, body in fences(text) if language == "bash" for line in body.splitlines()]
    shown = [line.split(" # ")[0].strip() for line in lines]
    inline = re.findall(r"`([^`\n]+)`", prose(text))
    typed = [code for code in inline if program_of(code) and (" " in code)]
    return [command for command in shown + typed if command and not command.startswith("#")]


def program_of(command):
    words = [word for word in command.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    first = words[0] if words else ""
    return first if first in PROGRAMS else ""


def wrong_with(command):
    """What is wrong with a command, in one sentence; None where nothing is."""
    words = shlex.split(command)
    while words and (setting := re.fullmatch(r"([A-Z_]+)=.*", words[0])):
        if setting[1].startswith("FLEXTRON_") and setting[1] not in variables_read():
            return f"{setting[1]} must be read somewhere"
        words.pop(0)
    if "&&" in words:
        cut = words.index("&&")
        return wrong_with(shlex.join(words[:cut])) or wrong_with(shlex.join(words[cut + 1 :]))
    if words[0] == "torchrun" and "flextron" in words:
        return wrong_with_flextron(words[words.index("flextron") + 1 :])
    program, *rest = words
    if program not in PROGRAMS:
        return f"{program} must be one of the programs that the pages use"
    if program == "torchrun":
        _, started, asked = command.partition(" -m flextron ")
        return wrong_with_flextron(shlex.split(asked)) if started else "it must start flextron"
    if program == "flextron":
        return wrong_with_flextron(rest)
    if program == "make":
        return wrong_with_make(rest)
    if program == "python" and rest[0].startswith("python/benchmarks/") and (wrong := wrong_with_bench(rest)):
        return wrong
    paths = [word for word in words if re.fullmatch(r"[\w./-]+\.(py|sh|cu)|tests(/\w+)*", word)]
    missing = [path for path in paths if not (ROOT / path).exists()]
    if missing:
        return f"{missing[0]} must be a file"
    if not any(re.match(pattern, shlex.join(words)) for pattern, _ in NOT_RUN):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
        return f"it must succeed, got exit code {done.returncode}" if done.returncode else None
    return None


def wrong_with_flextron(rest):
    if len(rest) == 1 and not rest[0].startswith("-"):  # a command that is merely named
        return None if rest[0] in subcommands() else f"{rest[0]} must be a command"
    try:
        parser_of(commands()).parse_args(rest)
    except SystemExit:  # --help and --version
        return None
    except ValueError as error:
        return str(error)
    return None


def wrong_with_make(rest):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    if rest[0] not in targets:
        return f"{rest[0]} must be a target of the Makefile"
    settings = dict(word.split("=", 1) for word in rest[1:])
    if extra := settings.keys() - {"ARGS", "TORCH", "PYTHON", "JOBS", "VENV"}:
        return f"{min(extra)} must be a variable of the Makefile"
    if rest[0] == "demo":
        return wrong_with_flextron(["demo", *shlex.split(settings.get("ARGS", ""))])
    return None


def wrong_with_bench(rest):
    path = ROOT / rest[0]
    if not path.is_file():
        return f"{rest[0]} must be a file"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        importlib.import_module(path.stem).parse(rest[1:])
    except SystemExit:
        return "its arguments must be those of the script"
    return None


def subcommands():
    return cli_page.commands()


def variables_read():
    """The environment variables FLEXTRON_* that any of our programs reads."""
    read = set()
    for file in ROOT.rglob("*"):
        if {"build", ".venv", ".venv-hosts"} & set(file.relative_to(ROOT).parts):
            continue
        if file.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
            text = file.read_text(encoding="utf-8", errors="ignore")
            read |= set(re.findall(r"(?:getenv\(|environ\.get\(|environ\[)\s*\"(FLEXTRON_\w+)\"", text))
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    return read | set(re.findall(r"\$\{(FLEXTRON_\w+):-", ci))


@each_page
def test_every_fenced_block_names_its_language(page):
    assert {language for language, _ in fences(text_of(page))} <= LANGUAGES


@each_page
def test_every_command_parses_and_what_is_quick_runs(page):
    wrong = {command: why for command in commands_of(text_of(page)) if (why := wrong_with(command))}
    assert not wrong


def test_every_command_that_is_not_run_says_why():
    named = {command for page in PAGES for command in commands_of(text_of(page))}
    assert named
    for pattern, why in NOT_RUN:
        assert why and any(re.search(pattern, command) for command in named), pattern
    cli = (ROOT / "tests" / "test_cli.py").read_text(encoding="utf-8")
    elsewhere = {"demo", "reproduce", "serve"}
    assert all(f'"{name}"' in cli for name in subcommands().keys() - elsewhere)


@pytest.mark.parametrize(
    "command, why",
    [
        ("flextron fly DIR", "fly"),
        ("flextron convert SRC DIR --no-such-option", "--no-such-option"),
        ("flextron convert SRC", "must be given"),
        ("torchrun --nproc-per-node 2 -m flextron train DIR --no-such-option", "--no-such-option"),
        ("make nothing", "target"),
        ('make demo ARGS="--no-such-option"', "--no-such-option"),
        ("make test COLOUR=red", "COLOUR"),
        ("pytest tests/no_such_file.py", "must be a file"),
        ("bash tests/no_such.sh", "must be a file"),
        ("nvcc -c csrc/kernels/no_such.cu", "must be a file"),
        ("FLEXTRON_NO_SUCH=1 pytest tests", "FLEXTRON_NO_SUCH"),
        ("python python/benchmarks/bench_ops.py --no-such-option", "arguments"),
        ("rm -rf /", "programs"),
        ("git no-such-command", "must succeed"),
    ],
)
def test_a_planted_command_is_found_wrong(command, why):
    (planted,) = commands_of(f"```bash\n{command}   # a comment\n```\n")
    assert planted == command
    assert why in wrong_with(planted)


def links_of(text):
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchors_of(text):
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page, text):
    broken = []
    for link in links_of(text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


@each_page
def test_links_lead_to_files_and_headings(page):
    assert not broken_links(page, text_of(page))


def test_a_planted_link_is_found_broken():
    planted = "[a](no-such.md) [b](README.md#no-such-heading) [c](README.md#two-commands) [d](https://a.b/c)"
    assert broken_links("README.md", planted) == ["no-such.md", "README.md#no-such-heading"]


@each_page
def test_files_named_in_code_are_there(page):
    inline = re.findall(r"`([^`\n]+)`", prose(text_of(page)))
    named = {
        code for code in inline if re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|sh|h|cpp|cu|cuh|md|yaml|csv)", code)
    }
    missing = {
        name for name in named if not (ROOT / name).exists() and not ((ROOT / page).parent / name).exists()
    }
    assert not missing


def test_the_page_of_ops_lists_every_op():
    cells = re.findall(r"^\|(\s*`\w+`[^|]*)\|", text_of("docs/ops.md"), re.MULTILINE)
    listed = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    headings = {
        name
        for line in re.findall(r"^## (.+)$", text_of("docs/ops.md"), re.MULTILINE)
        for name in re.findall(r"`(\w+)`", line)
    }
    ops = {schema.split("(")[0] for schema in schemas()}
    assert listed == headings == {op for op in ops if not op.endswith("_backward")}


def test_the_table_of_environment_variables_is_whole():
    listed = re.findall(r"^\| `(FLEXTRON_\w+)`", text_of("CONTRIBUTING.md"), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == variables_read()


def test_the_table_of_folders_names_every_layer():
    table = text_of("CONTRIBUTING.md").split("| folder |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    layers = {f"csrc/{layer}" for layer in test_layering.CSRC} | set(test_layering.PYTHON)
    assert layers - {"flextron.__main__"} <= named
    assert named <= layers | {"tests", "python/benchmarks"}


def test_the_worked_example_is_the_code():
    """Every listing of add-an-op.md stands, line by line, in one of the files that its table names."""
    page = text_of("docs/add-an-op.md")
    files = re.findall(r"^\| `([\w/]+\.\w+)` \|", page, re.MULTILINE)
    code = {name: (ROOT / name).read_text(encoding="utf-8") for name in files}
    assert all("prefix_gate" in text or name == "CHANGELOG.md" for name, text in code.items())
    for language, body in fences(page):
        if language in ("python", "cpp"):
            assert any(is_in(body, text) for text in code.values()), body
        if language == "python":
            ast.parse(textwrap.dedent(body))


def is_in(listing, text):
    """Whether its lines stand in the text one after the other, however far they are indented there."""
    wanted, lines = ([line.strip() for line in part.strip().splitlines()] for part in (listing, text))
    return any(lines[i : i + len(wanted)] == wanted for i in range(len(lines)))


def test_a_planted_listing_is_not_in_the_code():
    assert is_in("a = 1\n    b = 2\n", "x\n  a = 1\n  b = 2\n")
    assert not is_in("a = 1\nb = 3\n", "a = 1\nb = 2\n")


def test_the_page_of_families_says_what_the_code_does():
    assert families_page.faults() == [], "run python tests/families_page.py --update"


def test_the_page_of_commands_is_the_parsers():
    page = text_of("docs/cli.md")
    assert page.split(cli_page.MARK)[1] == f"\n{cli_page.made()}", "run python tests/cli_page.py --update"
    assert set(cli_page.commands()) == {
        name for name in re.findall(r"^\| `flextron (\w+)", page, re.MULTILINE)
    }
