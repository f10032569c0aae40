"""How long the next step will take, from those before it, while an engine has more than it can do.

Only then does it matter: requests at the head of a long queue are about to be late, and a step that
ends after their deadline is computed in vain.
"""

from __future__ import annotations

from collections import deque

_REMEMBERED = 16
_SHARE = 0.9


class StepTimes:
    """The duration of the latest steps since the engine was last idle."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=_REMEMBERED)
        self._began = 0.0
        self.expected = 0.0
        """Seconds within which nine of ten of the latest steps ended; 0 where there are none. A
        request that is begun too late costs another one its place, so half would be too few."""

    def begin(self, now: float) -> None:
        """A step was planned."""
        self._began = now

    def end(self, now: float) -> None:
        """It was carried out."""
        self._latest.append(now - self._began)
        self.expected = sorted(self._latest)[int(_SHARE * (len(self._latest) - 1))]

    def forget(self) -> None:
        """The engine is idle: what was usual in a storm says nothing of the time after it."""
        self._latest.clear()
        self.expected = 0.0
