"""Contexts of recorded requests, put together again: those that only grow are kept once.

A lineage is a context and all its beginnings that were asked with. A user whose context only grows
has one; where an event was changed or the window moved, a new one begins, which shares with the old
one the blocks that did not change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from helm_engine.request_trace.file_format import TraceRecord

Int64Array = npt.NDArray[np.int64]

_NONE = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class Lineage:
    """The longest context so far."""

    user: int
    """Hashed id; 0 = nobody's."""
    rows: Int64Array
    """Hashed rows of its tokens, int64 [tokens]."""
    blocks: Int64Array
    """Hashed ids of its reusable blocks, int64 [blocks]."""

    def takes(self, shared: int, block_tokens: int, rows: Int64Array, blocks: Int64Array) -> bool:
        """Whether a context belongs here that goes on so behind the shared blocks; grows if so."""
        here, there = self.rows[shared * block_tokens :], self.blocks[shared:]
        both, both_blocks = min(len(here), len(rows)), min(len(there), len(blocks))
        if not (
            np.array_equal(here[:both], rows[:both])
            and np.array_equal(there[:both_blocks], blocks[:both_blocks])
        ):
            return False
        if len(rows) > len(here):
            self.rows = np.concatenate([self.rows[: shared * block_tokens], rows])
        if len(blocks) > len(there):
            self.blocks = np.concatenate([self.blocks[:shared], blocks])
        return True


class Place(NamedTuple):
    """Where a request's context is."""

    lineage: int
    num_blocks: int
    """Reusable ones."""


@dataclass(slots=True)
class Lineages:
    """All lineages of a trace, built record by record."""

    block_tokens: int
    max_tokens: int
    """Of a context."""
    found: list[Lineage] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    """Of each record."""

    def add(self, record: TraceRecord) -> None:
        """Takes the next record.

        Raises:
            ValueError: it does not fit the earlier ones or itself; names the field.
        """
        rows, blocks = ids_of(record.rows, "rows", -1), ids_of(record.blocks, "blocks", 0)
        shared, base = record.shared_blocks, record.base
        self._check(record, len(rows), len(blocks))
        lineage = self.found[self.places[base].lineage] if base >= 0 else None
        if lineage is not None and lineage.takes(shared, self.block_tokens, rows, blocks):
            number = self.places[base].lineage
        else:
            begins, known = (_NONE, _NONE) if lineage is None else (lineage.rows, lineage.blocks)
            number = len(self.found)
            self.found.append(
                Lineage(
                    record.user,
                    np.concatenate([begins[: shared * self.block_tokens], rows]),
                    np.concatenate([known[:shared], blocks]),
                )
            )
        self.places.append(Place(number, shared + len(blocks)))

    def _check(self, record: TraceRecord, num_rows: int, num_blocks: int) -> None:
        shared, base, tokens = record.shared_blocks, record.base, record.num_tokens
        if tokens > self.max_tokens:
            raise ValueError(f"num_tokens: {tokens} is above the limit {self.max_tokens}")
        if base >= len(self.places):
            raise ValueError(f"base: {base} is no earlier record")
        if shared > (self.places[base].num_blocks if base >= 0 else 0):
            raise ValueError(f"shared_blocks: {shared} is more than record {base} has")
        if base >= 0 and self.found[self.places[base].lineage].user != record.user:
            raise ValueError(f"base: {base} is another user's")
        if num_rows != tokens - shared * self.block_tokens:
            raise ValueError(f"rows: {num_rows} do not make the {tokens} of num_tokens")
        if (shared + num_blocks) * self.block_tokens > tokens:
            raise ValueError(f"blocks: {shared + num_blocks} do not fit {tokens} tokens")


def ids_of(packed: bytes, field: str, least: int) -> Int64Array:
    """Hashed ids of a record, int64 [n].

    Raises:
        ValueError: they are none; names the field.
    """
    if len(packed) % 8:
        raise ValueError(f"{field}: {len(packed)} bytes are no whole ids")
    ids = np.frombuffer(packed, dtype="<i8").astype(np.int64, copy=False)
    if len(ids) and int(ids.min()) < least:
        raise ValueError(f"{field}: an id is below {least}")
    return ids
