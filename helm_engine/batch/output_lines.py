"""Output lines of a batch."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import msgspec

from helm_engine.batch.lines import BatchLine
from helm_engine.exceptions import HelmError
from helm_engine.protocol import Recommendation, error_body


@dataclass(frozen=True, slots=True)
class OutputLine:
    """One answer, ready to be written."""

    encoded: bytes
    """JSON `{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}`, with
    its newline."""
    succeeded: bool
    """Whether it is an answer and not an error."""


def beginning_of_output(line: BatchLine) -> bytes:
    """What the output line of an input line begins with, however it is answered."""
    fields = {"id": line.id, "custom_id": line.custom_id}
    return msgspec.json.encode(fields).removesuffix(b"}") + b","


def encode_answer(line: BatchLine, answer: Recommendation | HelmError) -> OutputLine:
    """The output line of an input line.

    As with OpenAI, `error` is null and the response to a bad line has an error body.
    """
    if isinstance(answer, HelmError):
        status_code, request_id = answer.status, f"rec-{uuid.uuid4().hex}"
    else:
        status_code, request_id = 200, answer.id
    rest = {
        "response": {
            "status_code": status_code,
            "request_id": request_id,
            "body": _response_body(answer),
        },
        "error": None,
    }
    encoded = beginning_of_output(line) + msgspec.json.encode(rest).removeprefix(b"{") + b"\n"
    return OutputLine(encoded, status_code == 200)


def _response_body(answer: Recommendation | HelmError) -> dict[str, Any]:
    body = error_body(answer) if isinstance(answer, HelmError) else answer
    return body.model_dump()
