"""Progress of long steps on stderr: a bar on a terminal, an occasional plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

# between two plain lines of one step, in seconds
PLAIN_INTERVAL = 20.0


class Step(Protocol):
    """One running step."""

    def update(self, done: float, total: float | None = None) -> None:
        """``done`` of ``total`` (same unit, any); the total may become known late."""


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def update(self, done: float, total: float | None = None) -> None:
        if total is not None:
            self._bar.update(self._task, completed=done, total=total)
        else:
            self._bar.update(self._task, completed=done)


class _Plain:
    def __init__(self, title: str) -> None:
        self._title = title
        self._total: float | None = None
        self._last = time.monotonic()

    def update(self, done: float, total: float | None = None) -> None:
        self._total = total if total is not None else self._total
        now = time.monotonic()
        if not self._total or now - self._last < PLAIN_INTERVAL:
            return
        self._last = now
        say(f"{self._title}: {100 * done / self._total:.0f} %")


def say(text: str) -> None:
    """One line for the person who waits, on stderr (stdout is for results)."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def step(title: str, total: float | None = None) -> Iterator[Step]:
    """Shows ``title`` while the block runs; ``total=None`` means the length is not known (yet)."""
    if not sys.stderr.isatty():
        say(f"{title} ...")
        started = time.monotonic()
        plain = _Plain(title)
        plain.update(0, total)
        yield plain
        say(f"{title}: done in {time.monotonic() - started:.0f} s")
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield _Bar(bar, task)
        shown = bar.tasks[0].total or 1
        bar.update(task, total=shown, completed=shown)
