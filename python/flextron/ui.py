"""What is shown while a command runs: progress bars with the time left, and tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

console = Console(stderr=True)  # standard output is for results

_NO_LIMIT = 10_000  # columns
_LONGEST = 1e9  # seconds: what takes longer is not said
_PLAIN_SECONDS = 10.0  # without a terminal a line is printed instead of a bar, at most this often


class _Bars(Progress):
    """Bars, and a line below them."""

    note = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.note:
            yield Text(self.note, no_wrap=True, overflow="ellipsis")


class Reporter:
    """Shows one progress bar for each ``what`` that it is called with."""

    def __init__(self, bars: _Bars | None) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}
        self._begun: dict[str, tuple[int, float]] = {}  # how much was done at the first call, and when
        self._note = ""

    def note(self, text: str) -> None:
        """Show ``text`` with what is called next."""
        self._note = text
        if self._bars is not None:
            self._bars.note = text

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._tasks[what], completed=done, total=total)
            return
        now = time.monotonic()
        self._begun.setdefault(what, (done, now))
        if done >= total or now - self._printed.get(what, -_PLAIN_SECONDS) >= _PLAIN_SECONDS:
            self._printed[what] = now
            left = self._left(what, done, total, now)
            console.print(
                ", ".join(filter(None, (f"{what} {done}/{total}", self._note, left))), highlight=False
            )

    def _left(self, what: str, done: int, total: int, now: float) -> str:
        """The time that is left at the mean speed since the first call."""
        first, began = self._begun[what]
        if done >= total or done <= first:
            return ""
        seconds = (now - began) / (done - first) * (total - done)
        return f"{timedelta(seconds=round(seconds))} left" if seconds < _LONGEST else ""


def tell(what: object) -> None:
    """Print a line above the bars."""
    console.print(str(what), highlight=False, soft_wrap=True)


@contextmanager
def reporter() -> Iterator[Reporter]:
    """A Reporter that shows bars on a terminal, and elsewhere prints a line now and then."""
    if not console.is_terminal:
        yield Reporter(None)
        return
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with _Bars(*columns, console=console) as bars:
        yield Reporter(bars)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output, the first column left-aligned, the others right-aligned.

    No text is cut off: on a terminal a long one takes several lines, elsewhere the table is as wide as it must be.
    """
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    out = Console()
    if not out.is_terminal:
        out.width = _NO_LIMIT
    out.print(table)


def print_budgets(title: str, budgets: Sequence[Mapping[str, Any]]) -> None:
    """Print the results of `flextron.judge.budgets.judge_budgets`, one row for each budget; ± is `spread_ms`."""
    header = ("budget", "target", "loss", "predicted ms", "measured ms", "±", "of full", "parameters")
    rows = [
        [
            b["kind"],
            f"{b['target']:.2f}",
            f"{b['loss']:.3f}",
            f"{b['predicted_ms']:.1f}",
            f"{b['measured_ms']:.1f}",
            f"{b['spread_ms']:.1f}",
            f"{b['measured_fraction']:.3f}",
            f"{b['params'] / 1e6:.2f} M",
        ]
        for b in budgets
    ]
    print_table(title, header, rows)
    _print_disturbed(budgets)


def _print_disturbed(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print why times mean nothing, where they do."""
    if said := next(filter(None, (row["disturbed"] for row in rows)), None):
        print(said)


def print_drafts(title: str, drafts: Sequence[Mapping[str, Any]]) -> None:
    """Print the results of `flextron.judge.drafting.judge_drafts`, one row for each draft and set of prompts."""
    header = (
        "prompts",
        "draft",
        "accepted",
        "of",
        "acceptance",
        "tokens/s",
        "without",
        "speed-up",
        "±",
        "same tokens",
    )
    rows = [
        [
            d["prompts"],
            f"{d['draft']:.2f}",
            str(d["accepted"]),
            str(d["proposed"]),
            f"{d['acceptance']:.2f}",
            f"{d['tokens_per_s']:.1f}",
            f"{d['plain_tokens_per_s']:.1f}",
            f"{d['speedup']:.2f}",
            f"{d['spread']:.2f}",
            "yes" if d["same"] else "no",
        ]
        for d in drafts
    ]
    print_table(title, header, rows)
    _print_disturbed(drafts)
