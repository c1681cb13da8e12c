"""The folder that a demonstration writes to: whose contents it replaces, and whose it does not."""

import pytest

from flextron.checkpoint.lock import LOCK_FILE
from flextron_lab.demo import run as demo


def test_a_folder_with_other_contents_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="demo: out must be new, empty or an earlier demonstration"):
        demo.run("tiny", tmp_path, progress=print)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_what_a_killed_demonstration_left_is_no_obstacle(tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def begin(*_, **__):
        raise Begun

    monkeypatch.setattr(demo, "load_parent", begin)
    (tmp_path / LOCK_FILE).touch()
    with pytest.raises(Begun):
        demo.run("tiny", tmp_path, progress=print)
