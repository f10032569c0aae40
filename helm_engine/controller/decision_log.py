"""One line of JSON for each query of a policy: what it saw, what each layer wanted, what came."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec

from helm_engine.controller.allocation_controller import Decision

logger = logging.getLogger(__name__)


class DecisionLog:
    """Appends to a file, or says it at debug level where there is none.

    The file is opened for each line: decisions are rare, and whoever rotates logs may take it away.
    """

    def __init__(self, path: Path | None) -> None:
        """Sees whether the file can be written.

        Raises:
            ValueError: it cannot.
        """
        self._path = path
        self.is_kept = path is not None or logger.isEnabledFor(logging.DEBUG)
        """Whether anybody gets to see the decisions; decided once, for each of them is timed."""
        if path is not None:
            try:
                path.open("a").close()
            except OSError as error:
                raise ValueError(
                    f"decision_log: {path}: cannot be written: {error.strerror}"
                ) from error

    def write(self, decision: Decision) -> None:
        """Takes a decision."""
        if self._path is not None:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(describe(decision)) + "\n")
            except OSError as error:
                # A full disk must not end what it only watches.
                logger.warning("decisions are no longer written: %s", error)
                self._path = None
        else:
            logger.debug("decision %s", json.dumps(describe(decision)))


def describe(decision: Decision) -> dict[str, Any]:
    """A decision in plain types; numbers that are none become null."""
    seen = decision.observation
    return {
        "at": decision.at,
        "target": decision.target,
        "committed": decision.committed,
        "rate": decision.rate,
        "parts": {name: _number(value) for name, value in decision.parts.items()},
        "held": decision.held,
        "observation": None
        if seen is None
        else {name: _number(value) for name, value in msgspec.structs.asdict(seen).items()},
    }


def _number(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return float(value) if abs(value) < float("inf") else None
