"""Tables of a page that are written anew: between `<!-- table NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_HEAD_LINES = 2


def fill(page: str, tables: Mapping[str, Iterable[str]]) -> str:
    """The page with these tables in their places.

    Args:
        page: Markdown; every table that it names is among `tables`.
        tables: lines of each by name, the first two are the head; one that has only a head was not
            measured yet, which the page then says.
    """

    def table(match: re.Match[str]) -> str:
        lines = [*tables[match[2]]]
        body = "\n".join(lines) if len(lines) > _HEAD_LINES else "(not measured yet)"
        return f"{match[1]}{body}\n{match[3]}"

    return _TABLE.sub(table, page)


def told(found: Mapping[str, Any], digits: int = 2) -> str:
    """A mean over seeds and its interval, see `controller_summary.mean_and_interval`."""
    if found["mean"] is None:
        return ""
    if found["interval"] is None:
        return f"{found['mean']:.{digits}f}"
    low, high = found["interval"]
    return f"{found['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
