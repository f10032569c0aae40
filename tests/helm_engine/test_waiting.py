"""What a terminal shows of slow work, and that nothing else does."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from helm_engine.entrypoints import waiting
from helm_engine.entrypoints.waiting import SlowNotice


class Screen(io.StringIO):
    """A terminal's output that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        self.written.set()
        return written


@pytest.fixture
def screen() -> Screen:
    return Screen()


def console(screen: Screen, terminal: bool) -> Console:
    return Console(file=screen, force_terminal=terminal, width=60)


def test_slow_work_is_named_and_the_terminal_left_as_it_was(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.0)
    with SlowNotice(console(screen, terminal=True)) as notice:
        notice.say("loading torch")
        assert screen.written.wait(30)
        notice.say("loading [model]")
        notice.end()
        shown = screen.getvalue()
        assert "loading [model]" in shown
        # The cursor is back, and the line is empty again.
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
        assert shown.endswith("\x1b[2K")
        notice.say("serving")
    assert screen.getvalue() == shown


def test_quick_work_is_not_mentioned(screen: Screen) -> None:
    with SlowNotice(console(screen, terminal=True)) as notice:
        notice.say("loading torch")
    assert screen.getvalue() == ""


def test_where_no_terminal_is_nothing_is_shown(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.0)
    before = set(threading.enumerate())
    with SlowNotice(console(screen, terminal=False)) as notice:
        notice.say("loading torch")
        assert set(threading.enumerate()) <= before
    assert screen.getvalue() == ""
