"""Offline batch scoring: OpenAI batch lines in, result lines out, in the same order."""

from __future__ import annotations

import json
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helm_engine.exceptions import HelmError, InvalidRequestError
from helm_engine.int_array import parse_json
from helm_engine.protocol import Recommendation, error_body
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


def check_files(source: Path, target: Path) -> None:
    """Checks both files before a model is loaded for them.

    Raises:
        OSError: the input cannot be read.
        ValueError: both are the same file.
    """
    with source.open("rb"):
        pass
    if target.exists() and target.samefile(source):
        raise ValueError(f"output: {target} is the input file")


def run_batch(recommender: Recommender, source: Path, target: Path) -> BatchCount:
    """Answers every line of a file; a bad line becomes an error line.

    Args:
        recommender: the engine.
        source: JSON lines `{"custom_id", "method": "POST", "url": "/v1/recommend", "body"}`;
            blank lines are skipped.
        target: JSON lines `{"id", "custom_id", "response": {"status_code", "request_id", "body"},
            "error"}`, in the order of the input. It is replaced.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: both files are the same.
    """
    check_files(source, target)
    succeeded = failed = 0
    with source.open("rb") as lines, target.open("w", encoding="utf-8") as out:
        for line, answer in _answer_lines(recommender, _parse_lines(lines)):
            out.write(json.dumps(_result_line(line, answer)) + "\n")
            if isinstance(answer, HelmError):
                failed += 1
            else:
                succeeded += 1
    return BatchCount(succeeded, failed)


def _parse_lines(lines: Iterable[bytes]) -> Iterator[_Line]:
    return (_parse_line(n, line) for n, line in enumerate(lines, start=1) if line.strip())


def _parse_line(number: int, raw: bytes) -> _Line:
    """Takes a line apart; what is wrong with it is said with its number."""

    def bad(custom_id: str | None, field: str, problem: str) -> _Line:
        message = f"line {number}: {field}: {problem}"
        return _Line(custom_id, None, InvalidRequestError(message, field))

    try:
        parsed = parse_json(raw)
    except ValueError as error:
        return bad(None, "line", f"is not JSON: {error}")
    if not isinstance(parsed, dict):
        return bad(None, "line", "must be a JSON object")
    custom_id = parsed.get("custom_id")
    if not isinstance(custom_id, str):
        return bad(None, "custom_id", "must be a string")
    method, url = parsed.get("method"), parsed.get("url")
    if not isinstance(method, str) or method != "POST":
        return bad(custom_id, "method", "must be POST")
    if not isinstance(url, str) or url not in _URLS:
        return bad(custom_id, "url", f"must be one of {', '.join(_URLS)}")
    if "body" not in parsed:
        return bad(custom_id, "body", "is missing")
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
        status, request_id = answer.status, f"rec-{uuid.uuid4().hex}"
        body = asdict(error_body(answer))
    else:
        status, request_id, body = 200, answer.id, asdict(answer)
    return {
        "id": f"batch-{request_id}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": None,
    }
