"""What a terminal shows while a command works; nothing where stderr is no terminal."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

PATIENCE_S = 2.0
"""What takes less is over before it has been read."""


class SlowNotice:
    """Says what a command is doing once that has taken two seconds; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._timer: threading.Timer | None = None
        self._what = ""
        self._done = 0
        self._total: int | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._timer = threading.Timer(PATIENCE_S, self._show)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def say(self, what: str, done: int = 0, total: int | None = None) -> None:
        """Names what is done from now on, how far it is, and how far it goes if that is known."""
        with self._lock:
            self._what, self._done, self._total = what, done, total
            if self._progress is not None:
                for task in self._progress.task_ids:
                    self._progress.update(task, description=what, completed=done, total=total)

    def end(self) -> None:
        """Leaves the terminal as it was; nothing is shown from now on."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._progress is not None:
                self._progress.stop()
                self._progress = None

    def _show(self) -> None:
        with self._lock:
            if self._timer is None:
                return  # It ended while the timer was firing.
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
                redirect_stdout=False,
            )
            self._progress.add_task(self._what, completed=self._done, total=self._total)
            self._progress.start()


def progress_bar(amount: ProgressColumn | None = None) -> Progress:
    """A bar for each task, on stderr; a context manager.

    Args:
        amount: how what is done is told; default: `12/40`.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        amount or MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        # Drawing takes the processor from what is measured.
        refresh_per_second=4,
        disable=not console.is_terminal,
    )
