"""The commands: which there are, what each says of its options, and what is said of one that is not there."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flextron import cli
from flextron.cli import discovery
from flextron.cli.discovery import LAB, OWN, commands
from flextron.cli.options import taken
from flextron.cli.parser import parser_of
from flextron.recipes import AdaptiveConfig, RouteConfig, TrainConfig, TuneConfig

HELLO = '''"""Greet the world in a sentence."""
EXAMPLE = "flextron hello"
def options(parser):
    parser.add_argument("--name", default="world", help="name of whom to greet")
def run(args):
    return {"hello": args.name}
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package, installed in a folder of its own, whose entry points are the ones given."""

    def install(entries: dict[str, str]) -> None:
        (tmp_path / "flextron_hello.py").write_text(HELLO)
        info = tmp_path / "flextron_hello-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flextron-hello\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
        (info / "entry_points.txt").write_text(f"[{discovery.GROUP}]\n{lines}")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("flextron_hello", None)


@pytest.fixture
def no_lab(monkeypatch):
    monkeypatch.setattr(discovery, "entry_points", lambda group: ())


def listed(capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_an_installed_package_adds_a_command(plugin, capsys):
    plugin({"hello": "flextron_hello"})
    assert re.search(r"^    hello +Greet the world in a sentence$", listed(capsys), re.MULTILINE)
    assert cli.main(["hello", "--name", "moon", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"hello": "moon"}


def test_a_command_that_cannot_be_loaded_is_told_when_it_is_asked_for(plugin, capsys):
    plugin({"broken": "flextron_nowhere.command", "hello": "flextron_hello"})
    assert "broken" not in (text := listed(capsys)) and "hello" in text
    assert cli.main(["broken", "x"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "flextron: broken: flextron_nowhere.command must be importable, got No module named 'flextron_nowhere'\n"
    )


def test_no_package_replaces_a_command_of_the_library(plugin):
    plugin({"info": "flextron_hello"})
    assert commands()["info"].__name__ == "flextron.cli.info"


@pytest.mark.parametrize(
    ("line", "asked", "entry"),
    [*((name, name, name) for name in LAB), ("eval d --tasks piqa", "eval: --tasks", "eval.tasks")],
)
def test_without_the_lab_a_sentence_says_what_is_missing(line, asked, entry, no_lab, capsys):
    assert set(commands()) == set(OWN)
    assert cli.main(line.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"flextron: {asked}: flextron_lab must be installed, got no entry point {entry} in "
    )
    assert len(said.splitlines()) == 1


def test_help_loads_neither_torch_nor_transformers():
    program = (
        "import sys\nfrom flextron.cli import main\n"
        "for argv in (['--help'], ['route', '--help']):\n"
        "    try: main(argv)\n"
        "    except SystemExit: pass\n"
        "print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stderr


@pytest.mark.parametrize(
    ("line", "recipe"),
    [
        ("train d", TrainConfig),
        ("tune d", TuneConfig),
        ("route d", RouteConfig),
        ("route d --adaptive", AdaptiveConfig),
    ],
)
def test_a_recipe_that_is_given_no_option_is_the_default_one(line, recipe):
    parse = parser_of(commands()).parse_args
    assert taken(recipe, parse(line.split())) == recipe()
    assert taken(recipe, parse([*line.split(), "--steps", "7", "--seed", "3"])) == recipe(steps=7, seed=3)


# A phrase begins with a verb, a noun, its article, or "how", "what", "whether".
NO_BEGINNING = re.compile(
    r"(?:of|for|in|on|at|by|to|from|with|without|as|than|not|none|only|also|and|or|but|whose|that|which|it|its|they|"
    r"them|this|these|those|each|every|all|both|any|some|default|see)\b",
    re.IGNORECASE,
)
# "tokens of each": of each what?
NO_END = re.compile(r"\b(?:of|for|in|at|with|by) (?:each|it|them|that|this|these|those|one)\s*(?:[;,.:)]|$)")


def faults(text: str | None) -> str | None:
    """What keeps a help text from being a phrase that stands by itself."""
    if len(re.findall(r"[\w'-]+", text or "")) < 3:
        return "must have three words"
    if found := NO_BEGINNING.match(text):
        return f"must not begin with {found.group()}"
    if found := NO_END.search(text):
        return f"must name what it speaks of after {found.group().strip(';,.:) ')}"
    return None


def explained() -> dict[str, str | None]:
    """Every command, argument and option -> its help text."""
    parser = parser_of(commands())
    (adding,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    texts = {name: sub.description for name, sub in adding.choices.items()}
    for name, sub in adding.choices.items():
        for action in sub._actions:
            if not isinstance(action, argparse._HelpAction):
                texts[f"{name} {action.option_strings[-1:] or action.dest}"] = action.help
    return texts


def test_every_help_text_is_a_phrase():
    texts = explained()
    assert {*OWN, *LAB} <= set(texts) and len(texts) > 100
    wrong = [f"{name} {fault}: {text!r}" for name, text in texts.items() if (fault := faults(text))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "sequences",
        "tokens of each",
        "tokens of each; the rest is padded",
        "of importance over tokens",
        "for comparisons",
        "of them, random configurations at the start",
        "whose latency is meant",
        "also at widths of every token's own",
        "with --tasks: folder of their files",
    ],
)
def test_a_text_that_is_no_phrase_is_caught(text):
    assert faults(text)


def test_every_recipes_field_says_what_it_does():
    for recipe in (TrainConfig, TuneConfig, RouteConfig, AdaptiveConfig):
        for name, field in recipe.__dataclass_fields__.items():
            assert not faults(field.metadata["text"]), f"{recipe.__name__}.{name}"


def test_no_file_of_the_command_line_is_long():
    files = [*Path(cli.__file__).parent.glob("*.py")]
    assert len(files) > len(OWN)
    assert not [f.name for f in files if len(f.read_text(encoding="utf-8").splitlines()) > 300]
