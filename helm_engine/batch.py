"""Offline batch scoring: OpenAI batch lines in, result lines out, in the same order."""

from __future__ import annotations

import json
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helm_engine.exceptions import HelmError, InvalidRequestError
from helm_engine.protocol import ErrorBody, ErrorDetail, Recommendation
from helm_engine.recommender import Recommender

_URLS = ("/v1/recommend", "/recommend")


@dataclass(frozen=True, slots=True)
class BatchCount:
    """How a batch went."""

    succeeded: int
    failed: int


@dataclass(frozen=True, slots=True)
class _Line:
    """One input line: its id, and its request body or what is wrong with it."""

    custom_id: str | None
    body: object
    error: InvalidRequestError | None = None


def run_batch(recommender: Recommender, source: Path, target: Path) -> BatchCount:
    """Answers every line of a file; a bad line becomes an error line.

    Args:
        recommender: the engine.
        source: JSON lines `{"custom_id", "method": "POST", "url": "/v1/recommend", "body"}`;
            blank lines are skipped.
        target: JSON lines `{"id", "custom_id", "response": {"status_code", "request_id", "body"},
            "error"}`, in the order of the input.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: both files are the same.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"output: {target} is the input file")
    succeeded = failed = 0
    with source.open("rb") as lines, target.open("w", encoding="utf-8") as out:
        for line, answer in _answer_lines(recommender, map(_parse_line, _non_blank(lines))):
            out.write(json.dumps(_result_line(line, answer)) + "\n")
            if isinstance(answer, HelmError):
                failed += 1
            else:
                succeeded += 1
    return BatchCount(succeeded, failed)


def _non_blank(lines: Iterable[bytes]) -> Iterator[bytes]:
    return (line for line in lines if line.strip())


def _parse_line(raw: bytes) -> _Line:
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return _Line(None, None, InvalidRequestError(f"line: is not JSON: {error}", "line"))
    if not isinstance(parsed, dict):
        return _Line(None, None, InvalidRequestError("line: must be a JSON object", "line"))
    custom_id = parsed.get("custom_id")
    if not isinstance(custom_id, str):
        message = "custom_id: must be a string"
        return _Line(None, None, InvalidRequestError(message, "custom_id"))
    if parsed.get("method") != "POST":
        return _Line(custom_id, None, InvalidRequestError("method: must be POST", "method"))
    if parsed.get("url") not in _URLS:
        message = f"url: must be one of {', '.join(_URLS)}"
        return _Line(custom_id, None, InvalidRequestError(message, "url"))
    if "body" not in parsed:
        return _Line(custom_id, None, InvalidRequestError("body: is missing", "body"))
    return _Line(custom_id, parsed["body"])


def _answer_lines(
    recommender: Recommender, lines: Iterable[_Line]
) -> Iterator[tuple[_Line, Recommendation | HelmError]]:
    """Pairs lines with answers while only as many are read as the engine takes at once."""
    read: deque[_Line] = deque()

    def bodies() -> Iterator[object]:
        for line in lines:
            read.append(line)
            yield line.error if line.error is not None else line.body

    for answer in recommender.stream(bodies()):
        yield read.popleft(), answer


def _result_line(line: _Line, answer: Recommendation | HelmError) -> dict[str, Any]:
    if isinstance(answer, HelmError):
        status = answer.status
        detail = ErrorDetail(
            message=str(answer), type=answer.error_type, param=answer.param, code=status
        )
        request_id: str = f"rec-{uuid.uuid4().hex}"
        body: dict[str, Any] = ErrorBody(error=detail).model_dump()
    else:
        status, request_id, body = 200, answer.id, answer.model_dump()
    return {
        "id": f"batch-{request_id}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": None,
    }
