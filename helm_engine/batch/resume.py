"""What an earlier run has already answered, held against the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import msgspec

from helm_engine.batch.journal import Journal
from helm_engine.batch.lines import BatchLine
from helm_engine.batch.output_lines import beginning_of_output


class _Response(msgspec.Struct):
    status_code: int


class _OutputLine(msgspec.Struct):
    """What is read of an answer that is there."""

    id: str
    custom_id: str | None
    response: _Response


@dataclass(slots=True)
class BatchCount:
    """How a batch went, lines of earlier runs included."""

    succeeded: int = 0
    failed: int = 0
    kept: int = 0
    """Of these, lines that an earlier run had answered."""

    def add(self, succeeded: bool) -> None:
        """Counts an answered line."""
        self.succeeded += succeeded
        self.failed += not succeeded


class OutputMismatchError(ValueError):
    """The output file answers something else; it is left as it is."""

    def __init__(self, path: Path, number: int, problem: str) -> None:
        super().__init__(
            f"output: {path}: line {number} {problem}; the file is left as it is, "
            "choose another -o or remove it"
        )


def keep_answered(
    journal: Journal, lines: Iterator[BatchLine], report: Callable[[BatchLine], None]
) -> tuple[BatchCount, Iterator[BatchLine]]:
    """Reads over the input lines that the journal has answers of, and cuts a torn last one.

    Args:
        journal: left so that the next line is added behind the last complete one.
        lines: the input.
        report: told of each line that is kept.

    Returns:
        The lines that are kept, counted, and those that are still to be answered.

    Raises:
        OSError: the file cannot be read or cut.
        OutputMismatchError: it holds answers of another input or model, or something else.
    """
    kept_bytes = 0
    kept = BatchCount()
    unanswered = lines
    for number, raw in enumerate(journal.lines(), start=1):
        line = next(lines, None)
        if line is None:
            raise OutputMismatchError(journal.path, number, "is beyond the last input line")
        if not raw.endswith(b"\n"):
            _check_torn(journal.path, number, raw, line)
            unanswered = chain([line], lines)
            break
        try:
            result = msgspec.json.decode(raw, type=_OutputLine)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise OutputMismatchError(
                journal.path, number, f"is no answer of a batch ({error})"
            ) from error
        check_answer(journal.path, number, (result.id, result.custom_id), line)
        kept.add(result.response.status_code == 200)
        kept_bytes += len(raw)
        report(line)
    journal.cut(kept_bytes)
    kept.kept = kept.succeeded + kept.failed
    return kept, unanswered


def check_answer(
    path: Path, number: int, found: tuple[str | None, str | None], line: BatchLine
) -> None:
    """Checks that an output line or row is that of an input line.

    Args:
        path: the output file.
        number: of the output line, from 1.
        found: its id and its custom_id.
        line: the input line.

    Raises:
        OutputMismatchError: it is another one's.
    """
    found_id, custom_id = found
    if custom_id != line.custom_id:
        raise OutputMismatchError(
            path,
            number,
            f"answers custom_id {custom_id!r}, input line {line.number} has {line.custom_id!r}",
        )
    if found_id != line.id:
        raise OutputMismatchError(
            path,
            number,
            f"has id {found_id}, not {line.id}: input line {line.number} or the model is not "
            "the one it was made of",
        )


def _check_torn(path: Path, number: int, torn: bytes, line: BatchLine) -> None:
    """A last line without an end is cut only if it began as the answer that comes next."""
    begins = beginning_of_output(line)
    if torn[: len(begins)] != begins[: len(torn)]:
        raise OutputMismatchError(
            path, number, f"is torn, and not from an answer to input line {line.number}"
        )
