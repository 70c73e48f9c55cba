"""Progress and tables: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

PLAIN_SECONDS = 5.0
PLAIN_WIDTH = 100

console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


class Task:
    """One running piece of work; `advance` and `note` may be called often."""

    def __init__(self, label: str, total: int | None, bar: Progress | None) -> None:
        self._label = label
        self._total = total
        self._bar = bar
        self._row = bar.add_task(label, total=total, note="") if bar else None
        self._done = 0
        self._spoken = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        """Count `amount` units as done."""
        self._done += amount
        if self._bar is not None and self._row is not None:
            self._bar.advance(self._row, amount)
        elif self._due():
            console.print(f"  {self._label}: {self._done} of {self._total}")

    def note(self, text: str) -> None:
        """Show `text` beside the label."""
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, note=text)
        elif self._due():
            console.print(f"  {self._label}: {text}")

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._spoken < PLAIN_SECONDS:
            return False
        self._spoken = now
        return True


@contextmanager
def working(label: str, total: int | None = None) -> Iterator[Task]:
    """Show that `label` is going on, as a bar where `total` is known."""
    begin = time.monotonic()
    if console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield Task(label, total, bar)
    else:
        console.print(f"  {label} ...")
        yield Task(label, total, None)
    console.print(f"  {label}: done in {time.monotonic() - begin:.1f} s")


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are figures."""
    drawn = Table(title=escape(title), title_justify="left")
    drawn.add_column(head[0])
    for name in head[1:]:
        drawn.add_column(name, justify="right")
    for row in rows:
        drawn.add_row(*map(escape, row))
    console.print(drawn)


def say_written(stem: Path) -> None:
    """Print which result files lie there now."""
    console.print(f"written: {stem.with_suffix('.json')}, {stem.with_suffix('.png')}")
