"""The errors of a call: those of the server, as it raised them, and those of the way to it."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec

from helm_engine import exceptions
from helm_engine.client.encoding import decode
from helm_engine.client.messages import Answer
from helm_engine.exceptions import HelmError

_SHOWN_CHARACTERS = 200
"""Of a body that is no error body of ours: enough to see who answered."""


class ServerConnectionError(HelmError, ConnectionError):
    """The server cannot be reached, or the connection broke before the whole answer had come."""

    status = 502
    error_type = "connection_error"


class ServerTimeoutError(ServerConnectionError, TimeoutError):
    """An attempt took longer than the client's `timeout`."""

    status = 504
    error_type = "timeout_error"


class InvalidAnswerError(HelmError):
    """The answer is not what this version of the client knows; another server may have sent it."""

    status = 502
    error_type = "invalid_answer_error"


class _Detail(msgspec.Struct):
    """An error of the server as it is sent; whatever else it holds is of a newer server."""

    message: str
    type: str
    param: str | None = None
    code: Any = None


class _Body(msgspec.Struct):
    error: _Detail


def _declared_classes() -> list[type[HelmError]]:
    """All errors that a server may answer with."""
    return [
        declared
        for declared in vars(exceptions).values()
        if isinstance(declared, type) and issubclass(declared, HelmError)
    ]


# Of several classes that look alike from here the first: later ones are overwritten.
_BY_STATUS = {one.status: one for one in reversed(_declared_classes())}
_BY_STATUS_AND_TYPE = {(one.status, one.error_type): one for one in reversed(_declared_classes())}


def error_of(answer: Answer) -> HelmError:
    """The error that an answer of another status than 2xx stands for; `status` is always kept."""
    try:
        body = msgspec.convert(decode(answer), _Body)
    except ValueError:
        return _foreign_error(answer)
    return _declared(answer.status, body.error)


def error_of_entry(entry: object) -> HelmError:
    """The error that stands in a list of answers in the place of one.

    Raises:
        ValueError: it is none.
    """
    detail = msgspec.convert(entry, _Body).error
    return _declared(detail.code if isinstance(detail.code, int) else HelmError.status, detail)


def _declared(status: int, detail: _Detail) -> HelmError:
    # A status can mean something else than a class: an unknown path is no unknown model.
    kind = _BY_STATUS_AND_TYPE.get((status, detail.type), HelmError)
    error = kind(detail.message, detail.param)
    error.status, error.error_type = status, detail.type
    return error


def _foreign_error(answer: Answer) -> HelmError:
    """Of a proxy, say: the status is all that is known."""
    text = answer.content.decode("utf-8", "replace").strip()[:_SHOWN_CHARACTERS]
    try:
        phrase = f"{answer.status} {HTTPStatus(answer.status).phrase}"
    except ValueError:
        phrase = str(answer.status)
    error = _BY_STATUS.get(answer.status, HelmError)(
        f"the server answered {phrase}" + (f": {text}" if text else "")
    )
    error.status = answer.status
    return error
