"""A model is written into new or empty directories; in place of another one when asked, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from flextron.checkpoint import CheckpointError
from flextron.checkpoint.card import write_card
from flextron.checkpoint.room import room_for_model

OURS = (
    *("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"),
    *("routers.json", "latency.json", "README.md", "parent_README.md", "LICENSE.txt", "chat_template.jinja"),
)


def test_a_new_or_empty_directory_needs_no_force(tmp_path: Path) -> None:
    assert room_for_model(tmp_path / "new", "convert") == []
    assert room_for_model(tmp_path, "convert") == []
    (tmp_path / ".flextron.lock").touch()  # who asks has it locked
    assert room_for_model(tmp_path, "convert") == []
    assert not (tmp_path / "new").exists()


def test_a_model_is_replaced_only_with_force_and_its_owners_files_stay(tmp_path: Path) -> None:
    for name in (*OURS, "notes.md", "thesis.tex", "my_lora.safetensors"):
        (tmp_path / name).touch()
    for name in ("training", "tokenizer-src"):
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=r"must be new or empty, got .* more; --force"):
        room_for_model(tmp_path, "convert")
    ours_alone = {"routers.json", "latency.json", "training"}  # where no elastic checkpoint is: its owner's
    assert room_for_model(tmp_path, "convert", force=True) == sorted({*OURS} - ours_alone)
    (tmp_path / "flextron.json").touch()
    assert room_for_model(tmp_path, "convert", force=True) == sorted([*OURS, "training", "flextron.json"])


def test_what_is_no_model_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    (tmp_path / "LICENSE").touch()
    with pytest.raises(CheckpointError, match=r"must hold a model to be replaced, got no config\.json"):
        room_for_model(tmp_path, "export", force=True)
    (tmp_path / "config.json").touch()  # many programs have one
    (tmp_path / "training").mkdir()
    with pytest.raises(
        CheckpointError, match=r"must hold a model to be replaced, got no weights beside LICENSE"
    ):
        room_for_model(tmp_path, "export", force=True)
    with pytest.raises(CheckpointError, match="must be a directory, got a file"):
        room_for_model(tmp_path / "LICENSE", "export", force=True)


def test_licence_and_card_go_along(tmp_path: Path) -> None:
    parent, child, grandchild = (tmp_path / name for name in ("parent", "child", "grandchild"))
    for folder in (parent, child, grandchild):
        folder.mkdir()
    (parent / "README.md").write_text("---\nlicense: mit\nlanguage: en\ntags: [chat]\n---\n# The parent\n")
    (parent / "LICENSE").write_text("MIT")
    (parent / "NOTICE.txt").write_text("by me")
    write_card(child, parent, "child", ["One.", "Two."], base="owner/parent")
    write_card(grandchild, child, "grandchild", ["Three."])
    for folder, body in ((child, "# child\n\nOne.\n\nTwo.\n"), (grandchild, "# grandchild\n\nThree.\n")):
        head, text = (folder / "README.md").read_text().removeprefix("---\n").split("\n---\n\n")
        assert text == body
        assert {"license: mit", "language: en", "base_model: owner/parent", "- flextron"} <= set(
            head.split("\n")
        )
        assert "chat" not in head
        assert (folder / "parent_README.md").read_text() == (parent / "README.md").read_text()
        assert (folder / "LICENSE").read_text() == "MIT" and (folder / "NOTICE.txt").exists()


@pytest.mark.parametrize("card", ["", "no head", "---\n: [\n---\n", "---\n- a\n---\n", "\xff\x00"])
def test_a_card_without_a_head_stops_nothing(tmp_path: Path, card: str) -> None:
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "README.md").write_bytes(card.encode("latin-1"))
    write_card(tmp_path, tmp_path / "parent", "child", [])
    assert "library_name: transformers" in (tmp_path / "README.md").read_text()
