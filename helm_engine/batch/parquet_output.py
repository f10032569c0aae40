"""Answers of a batch as a Parquet table; needs the extra `parquet`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from helm_engine.batch.journal import Journal
from helm_engine.batch.lines import BatchLine
from helm_engine.batch.resume import BatchCount, OutputMismatchError, check_answer

GROUP_ROWS = 1 << 14
GROUP_BYTES = 16 << 20
"""A row group ends with the row that reaches either; bytes as JSON."""

_USAGE = pa.struct(
    {
        "history_tokens": pa.int64(),
        "cached_tokens": pa.int64(),
        "reuse_blocked": pa.string(),
        "candidates": pa.int64(),
        "rows_requested": pa.int64(),
        "rows_resident": pa.int64(),
        "timings_ms": pa.struct(dict.fromkeys(("queue", "load", "prefill", "score"), pa.float64())),
    }
)
_ERROR = pa.struct(
    {"message": pa.string(), "type": pa.string(), "param": pa.string(), "code": pa.int16()}
)
SCHEMA = pa.schema(
    {
        "custom_id": pa.string(),
        "id": pa.string(),
        "status_code": pa.int16(),
        "item_ids": pa.list_(pa.int64()),
        "scores": pa.list_(pa.float32()),
        "task_scores": pa.map_(pa.string(), pa.list_(pa.float32())),
        "usage": _USAGE,
        "error": _ERROR,
    }
)
"""`item_ids` is best first, `scores` and each task's `task_scores` are as long; an error has null
in their place, an answer has null for `error`, and one of a model without tasks for
`task_scores`."""


class _Item(msgspec.Struct):
    item_id: int
    score: float
    task_scores: dict[str, float] | None = None


class _Body(msgspec.Struct):
    data: list[_Item] | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class _Response(msgspec.Struct):
    status_code: int
    body: _Body


class _Line(msgspec.Struct):
    id: str
    custom_id: str | None
    response: _Response


def unfinished_path(target: Path) -> Path:
    """Where a table is while it is being written."""
    return target.with_name(f"{target.name}.partial.parquet")


def convert(journal: Journal, target: Path, report: Callable[[int], None]) -> None:
    """Makes the table of a journal's lines; it is there as a whole or not at all.

    Args:
        journal: output lines, all complete.
        target: appears when all rows are on the disk.
        report: told how many bytes of the journal were read.

    Raises:
        OSError: the table cannot be written.
    """
    unfinished = unfinished_path(target)
    try:
        with unfinished.open("wb") as file:
            with pq.ParquetWriter(file, SCHEMA) as writer:
                done = 0
                for group in _groups(journal.lines()):
                    rows = [_row(msgspec.json.decode(raw, type=_Line)) for raw in group]
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    done += sum(map(len, group))
                    report(done)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise OSError(
            error.errno, error.strerror or str(error), error.filename or str(target)
        ) from error


def _groups(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    num_bytes = 0
    for raw in lines:
        group.append(raw)
        num_bytes += len(raw)
        if len(group) == GROUP_ROWS or num_bytes >= GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _row(line: _Line) -> dict[str, Any]:
    body = line.response.body
    items = body.data
    return {
        "custom_id": line.custom_id,
        "id": line.id,
        "status_code": line.response.status_code,
        "item_ids": None if items is None else [item.item_id for item in items],
        "scores": None if items is None else [item.score for item in items],
        "task_scores": _by_task(items or []),
        "usage": body.usage,
        "error": body.error,
    }


def _by_task(items: list[_Item]) -> dict[str, list[float]] | None:
    """Scores of each task, one for each item."""
    if not items or items[0].task_scores is None:
        return None
    return {
        name: [item.task_scores[name] for item in items if item.task_scores is not None]
        for name in items[0].task_scores
    }


def check_finished(
    target: Path, lines: Iterator[BatchLine], report: Callable[[BatchLine], None]
) -> BatchCount:
    """Checks that a finished table has the answers of these lines, all and no more.

    Raises:
        OSError: it cannot be read.
        OutputMismatchError: it has not.
    """
    count = BatchCount()
    number = 0
    for number, row in enumerate(_read_answers(target), start=1):
        line = next(lines, None)
        if line is None:
            raise OutputMismatchError(target, number, "is beyond the last input line")
        check_answer(target, number, (row["id"], row["custom_id"]), line)
        count.add(row["status_code"] == 200)
        report(line)
    if (line := next(lines, None)) is not None:
        raise OutputMismatchError(
            target, number + 1, f"is missing, the answer to input line {line.number}"
        )
    count.kept = number
    return count


def _read_answers(target: Path) -> Iterator[dict[str, Any]]:
    columns = ["id", "custom_id", "status_code"]
    try:
        with target.open("rb") as file, pq.ParquetFile(file, pre_buffer=False) as table:
            absent = [name for name in columns if name not in table.schema_arrow.names]
            if absent:
                raise OutputMismatchError(target, 1, f"has no column {absent[0]}")
            for batch in table.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise OutputMismatchError(target, 1, f"is no answer of a batch ({error})") from error
