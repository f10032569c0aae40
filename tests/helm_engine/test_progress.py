"""The progress bar of long commands."""

from __future__ import annotations

from io import StringIO
from threading import Event

import pytest
from rich.console import Console

from helm_engine.entrypoints.progress import LateProgress


class _Screen(StringIO):
    """Says when something is shown on it."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = Event()

    def write(self, text: str) -> int:
        if "answering" in text:
            self.shown.set()
        return super().write(text)


def test_a_terminal_shows_what_is_done_and_how_far() -> None:
    screen = _Screen()
    with LateProgress(Console(file=screen, force_terminal=True), delay_s=0.0) as progress:
        progress.report("loading", 0, None)
        progress.report("answering", 3, 4)
        assert screen.shown.wait(timeout=60)
    assert "75%" in screen.getvalue()


def test_what_is_done_soon_shows_nothing() -> None:
    screen = _Screen()
    with LateProgress(Console(file=screen, force_terminal=True), delay_s=3600.0) as progress:
        progress.report("answering", 3, 4)
    assert screen.getvalue() == ""


@pytest.mark.parametrize("delay_s", [0.0, 3600.0])
def test_a_file_or_pipe_shows_nothing(delay_s: float) -> None:
    screen = _Screen()
    with LateProgress(Console(file=screen), delay_s) as progress:
        progress.report("answering", 3, 4)
    assert screen.getvalue() == ""
