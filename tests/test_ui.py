"""Tables: nothing in them is cut off."""

import io

import pytest
from rich.console import Console

from flextron import ui

LONG = "prefill of 512 tokens 5.5 ms, decode after 512 tokens 0.9 ms, " * 3 + "the last words"


def test_an_end_beyond_a_lifetime_is_not_said(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ui.Reporter(None)
    reporter("training", 1, 10**30)
    assert reporter._left("training", 2, 10**30, ui.time.monotonic() + 1) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_shows_all_of_a_long_text(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    out = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    monkeypatch.setattr(ui, "Console", lambda: out)
    ui.print_table("a model", ["what", "value"], [["latency tables of machines", LONG]])
    printed = out.file.getvalue()
    assert "latency tables of machines" in printed
    assert "the last words" in printed
    assert terminal or LONG in printed
    assert "…" not in printed
