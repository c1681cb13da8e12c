"""Text that the parent writes for its checkpoint: how it is asked for, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from flextron import own_text
from flextron.corpus import Mix, corpus
from flextron.data import Text

FILE = Path("written.jsonl")


def asked(data):
    """(what stands in the place of ``data``, how many tokens were asked for)."""
    counts = []

    def write(count):
        counts.append(count)
        return FILE

    return own_text.written(data, 700, write), counts


def test_the_parent_writes_where_nothing_or_its_own_text_is_named():
    assert asked(None) == (FILE, [700])
    assert asked("parent:90") == (FILE, [90])
    assert asked(Text("parent:90")) == (FILE, [90])
    assert asked(Mix(["a.txt", "parent:90"], [1, 2])) == (Mix(["a.txt", FILE], [1, 2]), [90])
    for data in ("a.txt", Path("parent"), Text("a.txt"), Mix(["a.txt"]), Mix([None, "a.txt"])):
        assert asked(data) == (data, [])


def test_only_the_beginning_of_a_name_asks_the_parent():
    for data in (None, "parent:90", Text("parent:90"), Mix(["a.txt", "parent:90"])):
        assert own_text.is_asked(data)
    for data in ("texts/parent:90/a.txt", Path("parent"), Text("a.txt"), Mix(["a.txt"]), Mix([None])):
        assert not own_text.is_asked(data)


@pytest.mark.parametrize("name", ["parent:", "parent:0", "parent:-3", "parent:many", "parent:1.5"])
def test_a_number_of_tokens_must_be_one(name):
    with pytest.raises(ValueError, match=f"must be named as parent:TOKENS, got {name}"):
        asked(name)


def test_what_the_parent_writes_has_no_fields():
    with pytest.raises(
        ValueError, match="field must be given for text with fields, got 'body' for parent:90"
    ):
        asked(Text("parent:90", "body"))


def test_a_stage_that_changes_no_weight_names_the_file():
    with pytest.raises(ValueError, match="parent's own is for stages that change weights, got parent:90"):
        corpus(None, "parent:90")


def test_a_part_is_held_out_and_nobody_waits_for_ever():
    assert own_text.enough(45_000) == 50_000
    assert own_text.enough(1) == own_text.LEAST < own_text.enough(10**9) == own_text.MOST
