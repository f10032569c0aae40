"""Output lines of a batch."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import msgspec

from helm_engine.batch.lines import BatchLine
from helm_engine.body_codec import select_fields
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


def output_of(line: BatchLine, answer: Recommendation | HelmError, whole: bool) -> OutputLine:
    """The output line of an input line.

    As with OpenAI, `error` is null and the response to a bad line has an error body.

    Args:
        line: the input line.
        answer: to it.
        whole: write all of the answer, whatever the request's `fields` say.
    """
    body: Any = answer
    if isinstance(answer, HelmError):
        status_code, request_id = answer.status, f"rec-{uuid.uuid4().hex}"
        body = error_body(answer)
    else:
        status_code, request_id = 200, answer.id
        if line.fields is not None and not whole:
            body = select_fields(answer, line.fields)
    rest = {
        "response": {
            "status_code": status_code,
            "request_id": request_id,
            "body": body,
        },
        "error": None,
    }
    encoded = beginning_of_output(line) + msgspec.json.encode(rest).removeprefix(b"{") + b"\n"
    return OutputLine(encoded, status_code == 200)
