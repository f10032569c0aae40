"""Settings of the whole suite, and the self-check that follows every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from helm_engine.scheduler import Scheduler

# Triton's kernels run in its interpreter, on the CPU. Read when Triton is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# No test asserts a time: on a busy machine one slow example would be a false alarm.
settings.register_profile("suite", deadline=None, print_blob=True)
settings.register_profile("thorough", parent=settings.get_profile("suite"), max_examples=2000)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _books_add_up_after_every_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Checks the pool of every scheduler that a test made."""
    made: list[Scheduler] = []
    build = Scheduler.__init__

    def remember(scheduler: Scheduler, *args: Any, **kwargs: Any) -> None:
        build(scheduler, *args, **kwargs)
        made.append(scheduler)

    monkeypatch.setattr(Scheduler, "__init__", remember)
    yield
    for scheduler in made:
        scheduler.check_integrity()
