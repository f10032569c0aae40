"""Logging to stderr, wherever that is at the time."""

from __future__ import annotations

import logging
import sys
from typing import TextIO


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what is `sys.stderr` at the time: a progress display puts lines above itself."""

    @property
    def stream(self) -> TextIO:
        """The present `sys.stderr`."""
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass
