"""A batch that comes as JSON lines: `{"custom_id", "method", "url", "body"}`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from io import BufferedReader
from itertools import count
from pathlib import Path
from types import TracebackType

from helm_engine.batch.lines import BatchLine, LineDigest, with_custom_id
from helm_engine.int_array import parse_json
from helm_engine.protocol import RECOMMEND_PATHS

MAX_ENVELOPE_BYTES = 64 << 10
"""What a line may hold around its body: `custom_id`, `method`, `url` and punctuation."""


class JsonLinesInput:
    """An open file of JSON lines."""

    def __init__(self, path: Path, max_body_bytes: int) -> None:
        """Opens the file.

        Raises:
            OSError: it cannot be read.
        """
        self._file = path.open("rb")
        self._max_body_bytes = max_body_bytes
        status = os.fstat(self._file.fileno())
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
        """Bytes; None where that is known at the end only, as of a pipe."""

    def __enter__(self) -> JsonLinesInput:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def lines(self, model_version: str) -> Iterator[BatchLine]:
        """Reads the lines one by one, once; what is wrong with one comes in its place."""
        return read_json_lines(self._file, model_version, self._max_body_bytes)


def read_json_lines(
    file: BufferedReader, model_version: str, max_body_bytes: int
) -> Iterator[BatchLine]:
    """Reads JSON lines one by one; blank ones are skipped.

    A line beyond the limit becomes an error without ever being in memory as a whole.
    """
    limit = max_body_bytes + MAX_ENVELOPE_BYTES
    end = 0
    for number in count(1):
        raw = file.readline(limit)
        if not raw:
            return
        digest = LineDigest(model_version, number)
        num_bytes, piece = len(raw), raw
        while len(piece) == limit and not piece.endswith(b"\n"):
            digest.add(piece)
            piece = file.readline(limit)
            num_bytes += len(piece)
        digest.add(piece.removesuffix(b"\n"))
        end += num_bytes
        line = BatchLine(number, digest.id, None, None, None, num_bytes, end)
        if num_bytes > len(raw):
            problem = f"has {num_bytes} bytes, the limit is {limit} ({max_body_bytes} for its body)"
            yield replace(line, num_bytes=0).refused("line", problem)
        elif raw.strip():
            yield _parse_line(line, raw)


def _parse_line(line: BatchLine, raw: bytes) -> BatchLine:
    try:
        parsed = parse_json(raw)
    except ValueError as error:
        return line.refused("line", f"is not JSON: {error}")
    if not isinstance(parsed, dict):
        return line.refused("line", "must be a JSON object")
    line = with_custom_id(line, parsed.get("custom_id"))
    if line.error is not None:
        return line
    method, url = parsed.get("method"), parsed.get("url")
    if not isinstance(method, str) or method != "POST":
        return line.refused("method", "must be POST")
    if not isinstance(url, str) or url not in RECOMMEND_PATHS:
        return line.refused("url", f"must be one of {', '.join(RECOMMEND_PATHS)}")
    if "body" not in parsed:
        return line.refused("body", "is missing")
    return replace(line, body=parsed["body"])
