"""A batch that comes as a Parquet table; needs the extra `parquet`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from helm_engine.batch.lines import BatchLine, LineDigest, with_custom_id
from helm_engine.int_array import parse_json
from helm_engine.protocol import RecommendRequest

BATCH_ROWS = 16
"""Rows that are Python objects at a time: one may hold tens of thousands of events."""
READ_BYTES = 1 << 20
"""Read of a column at a time; without it, a whole row group would be."""


class ParquetInput:
    """An open table: `custom_id`, and a request's fields or its JSON `body` as columns.

    Fields of objects are structs or maps, arrays are lists; a null means that the field is absent.
    """

    def __init__(self, path: Path, max_body_bytes: int) -> None:
        """Opens the file and checks its columns.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no Parquet file, or names the column that does not belong to a batch.
        """
        self._path = path
        self._max_body_bytes = max_body_bytes
        self._file = path.open("rb")
        try:
            self._table = pq.ParquetFile(self._file, pre_buffer=False, buffer_size=READ_BYTES)
            _check_columns(self._table.schema_arrow)
        except ValueError as error:
            self._file.close()
            raise ValueError(f"input: {path}: {error}") from error
        self.size: int | None = self._table.metadata.num_rows
        """Rows."""

    def __enter__(self) -> ParquetInput:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._table.close()
        self._file.close()

    def lines(self, model_version: str) -> Iterator[BatchLine]:
        """Reads the rows one by one; what is wrong with one comes in its place.

        Raises:
            ValueError: the file is damaged.
        """
        for number, row in enumerate(self._rows(), start=1):
            custom_id = row.pop("custom_id")
            raw = row.get("body") if "body" in row else msgspec.json.encode(_without_nulls(row))
            content = raw.encode() if isinstance(raw, str) else raw
            digest = LineDigest(model_version, number)
            digest.add(msgspec.json.encode((custom_id, None if content is None else len(content))))
            digest.add(content or b"")
            line = BatchLine(number, digest.id, None, None, None, len(content or b""), number)
            yield self._parse(with_custom_id(line, custom_id), content)

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            for batch in self._table.iter_batches(batch_size=BATCH_ROWS):
                yield from batch.to_pylist(maps_as_pydicts="strict")
        except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
            raise ValueError(f"input: {self._path}: cannot be read: {error}") from error

    def _parse(self, line: BatchLine, content: bytes | None) -> BatchLine:
        if line.error is not None:
            return line
        if content is None:
            return line.refused("body", "is missing")
        if len(content) > self._max_body_bytes:
            problem = f"has {len(content)} bytes, the limit is {self._max_body_bytes}"
            return line.refused("body", problem)
        try:
            return replace(line, body=parse_json(content))
        except ValueError as error:
            return line.refused("body", f"is not JSON: {error}")


def _without_nulls(value: Any) -> Any:
    """Objects without their null fields; the nulls of lists stay, for they are wrong."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_without_nulls(one) for one in value]
    return value


def _check_columns(schema: pa.Schema) -> None:
    names = list(schema.names)
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"column {repeated}: is there twice")
    if "custom_id" not in names:
        raise ValueError(f"column custom_id: is missing, the columns are {', '.join(names)}")
    fields = ["body"] if "body" in names else list(RecommendRequest.model_fields)
    for name in names:
        if name not in ("custom_id", *fields):
            raise ValueError(
                f"column {name}: does not belong here; beside custom_id there may be "
                f"{', '.join(fields)}"
            )
    for name in ("custom_id", "body"):
        if name in names and not _is_text(schema.field(name).type):
            raise ValueError(f"column {name}: must be string, not {schema.field(name).type}")
    for field in schema:
        _check_type(field.name, field.type)


def _is_text(kind: pa.DataType) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _check_type(path: str, kind: pa.DataType) -> None:
    """What JSON has no value for (times, decimals, bytes) would not be what the user means."""
    if types.is_struct(kind):
        for field in kind:
            _check_type(f"{path}.{field.name}", field.type)
    elif types.is_map(kind):
        if not _is_text(kind.key_type):
            raise ValueError(f"column {path}: keys must be string, not {kind.key_type}")
        _check_type(path, kind.item_type)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        _check_type(path, kind.value_type)
    elif not (
        _is_text(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_null(kind)
    ):
        raise ValueError(f"column {path}: of type {kind}, which a request has nowhere")
