"""Input lines of a batch: what each asks for or what is wrong with it, and its id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from helm_engine.exceptions import InvalidRequestError


@dataclass(frozen=True, slots=True, eq=False)
class BatchLine:
    """One input line; a row of a Parquet file is one too."""

    number: int
    """From 1; blank lines count."""
    id: str
    """Of the answer: the same whenever the same model answers the same line."""
    custom_id: str | None
    """None where the line has none that could be given back."""
    body: Any
    """As parsed; None where there is an error."""
    error: InvalidRequestError | None
    """What is wrong with the line itself."""
    num_bytes: int
    end: int
    """How much of the input has been read with it, in the unit of the input's size."""

    @property
    def user(self) -> str | None:
        """Whose request it is."""
        user = self.body.get("user") if isinstance(self.body, dict) else None
        return user if isinstance(user, str) else None

    @property
    def fields(self) -> list[str] | None:
        """Parts of the answer that are wanted, as sent; None = all."""
        return self.body.get("fields") if isinstance(self.body, dict) else None

    def refused(self, field: str, problem: str) -> BatchLine:
        """The line with an error that says its number and names the field."""
        message = f"line {self.number}: {field}: {problem}"
        return replace(self, body=None, error=InvalidRequestError(message, field))


class LineDigest:
    """Makes a line's id of everything that decides its answer: model, place and content."""

    def __init__(self, model_version: str, number: int) -> None:
        self._digest = hashlib.blake2b(f"{model_version}/{number}/".encode(), digest_size=16)

    def add(self, raw: bytes) -> None:
        """Adds content; how it is cut into pieces does not matter."""
        self._digest.update(raw)

    @property
    def id(self) -> str:
        """`batch-` and 32 hex digits."""
        return f"batch-{self._digest.hexdigest()}"


def with_custom_id(line: BatchLine, custom_id: object) -> BatchLine:
    """The line with its `custom_id`, or refused where that could not be given back."""
    if not isinstance(custom_id, str):
        return line.refused("custom_id", "must be a string")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        return line.refused("custom_id", "holds half a surrogate pair, which UTF-8 cannot carry")
    return replace(line, custom_id=custom_id)


def refuse_duplicates(lines: Iterable[BatchLine]) -> Iterator[BatchLine]:
    """Refuses a line whose `custom_id` came before, naming the earlier line.

    Remembers a hash and a number for each line.
    """
    first_with: dict[bytes, int] = {}
    for line in lines:
        if line.custom_id is None:
            yield line
            continue
        key = hashlib.blake2b(line.custom_id.encode(), digest_size=16).digest()
        earlier = first_with.setdefault(key, line.number)
        if earlier == line.number:
            yield line
        else:
            yield line.refused("custom_id", f"must be unique, line {earlier} has the same")
