"""How long to wait before the next attempt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

FIRST_SECONDS = 0.1
"""Bound of the first wait; it doubles with each further one. A step of the engine takes less."""
MAX_SECONDS = 5.0


def backoff_seconds(num_retries: int, jitter: float) -> float:
    """Exponential backoff with full jitter, so that clients do not come back all at once.

    Args:
        num_retries: retries made so far.
        jitter: random, in [0, 1).
    """
    # 2**30 would do: the bound is reached long before.
    return jitter * min(MAX_SECONDS, FIRST_SECONDS * 2.0 ** min(num_retries, 30))


def retry_after_seconds(headers: Mapping[str, str]) -> float:
    """What an answer's `Retry-After` asks for, 0 without a readable one.

    A date counts from the answer's own `Date`: the server's clock and ours need not agree.
    """
    asked = headers.get("retry-after", "").strip()
    try:
        seconds = float(asked)
    except ValueError:
        try:
            until = parsedate_to_datetime(asked)
            seconds = (until - parsedate_to_datetime(headers.get("date", ""))).total_seconds()
        # Not dates, or one with and one without a time zone.
        except (ValueError, TypeError):
            return 0.0
    return seconds if 0 < seconds < math.inf else 0.0
