"""A progress bar for commands that may take long."""

from __future__ import annotations

import sys
from threading import Timer
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

DELAY_S = 2.0
"""What is done sooner shows no bar."""


class LateProgress:
    """A bar on stderr that shows once the work has taken a while, and on a terminal only."""

    def __init__(self, console: Console | None = None, delay_s: float = DELAY_S) -> None:
        self._console = console or Console(file=sys.stderr)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)
        self._description = ""
        self._timer = Timer(delay_s, self._progress.start)
        self._timer.daemon = True

    def __enter__(self) -> LateProgress:
        if self._console.is_terminal:
            self._timer.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if self._timer.ident is not None:
            self._timer.join()
        if self._progress.live.is_started:
            self._progress.stop()

    def report(self, description: str, done: int, total: int | None) -> None:
        """Says what is being done, how far it is, and how far it goes if that is known."""
        if description != self._description:
            self._description = description
            self._progress.reset(self._task, description=description)
        self._progress.update(self._task, completed=done, total=total)
