"""The file of a recorded trace: what is in it, how it is framed, and how it is read back.

A file is a magic line and frames behind one another. A frame is the length of its payload and the
payload's CRC-32, both little-endian uint32, and the payload, a msgpack array. The first is the
header, each other one a request or a note on what is missing. So a file grows by whole frames, and
whoever was killed while writing leaves a torn last frame at most. Nothing in it is ever executed:
payloads are decoded into the types below, and each number is held against its limit.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from model_executor.cost_profile import CostProfile

MAGIC = b"helm-engine trace 1\n"
FRAME_BYTES = 8
"""Before each payload."""
MAX_FRAME_BYTES = 1 << 24
"""One request of 65,536 tokens and as many candidates has a megabyte."""
ID_BYTES = 8
"""Of a hashed id, a little-endian int64."""

_Count = Annotated[int, Meta(ge=0, le=1 << 24)]
_Size = Annotated[int, Meta(ge=1, le=1 << 24)]
_Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]
MAX_MILLISECONDS = 1e12
MAX_PRIORITY = (1 << 31) - 1
_Milliseconds = Annotated[float, Meta(ge=0.0, le=MAX_MILLISECONDS)]


class TraceHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The engine that took the requests: all that a simulation of it needs."""

    engine_version: str
    pool_bytes: Annotated[int, Meta(ge=1, le=1 << 50)]
    emb_fraction: Annotated[float, Meta(ge=0.0, le=1.0)]
    """EMB share of the pages at the start."""
    block_tokens: Annotated[int, Meta(ge=1, le=1 << 16)]
    row_bytes: Annotated[int, Meta(ge=1, le=1 << 24)]
    """Of one embedding row in the pool."""
    kv_bytes_per_token: Annotated[int, Meta(ge=1, le=1 << 28)]
    """K and V over all layers."""
    num_rows: Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
    """Of all pooled tables."""
    max_context_tokens: _Size
    max_num_batched_tokens: _Size
    max_num_seqs: _Size
    max_num_waiting: _Size
    max_pages_per_step: _Size | None
    patience_ms: _Milliseconds
    chunkable: bool
    """This and the next three: see `StepRules`."""
    microbatch_unit: _Size
    recomputes_last_row: bool
    shortest_context: _Size
    refill_bytes_per_second: _Bytes
    link_bytes_per_second: Annotated[int, Meta(ge=1, le=1 << 50)] | None
    slo_ms: Annotated[float, Meta(gt=0.0, le=1e9)]
    controller: str | None
    """Who moved the boundary."""
    profile: CostProfile | None
    """What work costs on the device, where the server knew."""


class TraceRecord(msgspec.Struct, frozen=True, array_like=True, tag="request"):
    """A request, with what became of it.

    Contexts that begin alike are written once: a record names an earlier one of the same user and
    how many of its blocks it shares, and brings the rest.
    """

    at: Annotated[float, Meta(ge=-1e9, le=1e12)]
    """When it came: seconds after the start."""
    user: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    """Hashed id; 0 = it names none."""
    base: Annotated[int, Meta(ge=-1, lt=1 << 40)]
    """Number of the record, from 0, whose context begins alike; -1 = none."""
    shared_blocks: _Count
    """Full blocks that both begin with."""
    num_tokens: _Count
    """Of the whole context."""
    blocks: Annotated[bytes, Meta(max_length=MAX_FRAME_BYTES)]
    """Hashed ids of the reusable full blocks behind the shared ones."""
    rows: Annotated[bytes, Meta(max_length=MAX_FRAME_BYTES)]
    """Hashed rows of the tokens behind the shared blocks, in their order; -1 = reads none."""
    candidates: Annotated[bytes, Meta(max_length=MAX_FRAME_BYTES)]
    """Hashed rows of the candidates as the engine scores them; none = the catalogue is searched."""
    deadline_ms: _Milliseconds | None
    """After it came."""
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
    status: Annotated[int, Meta(ge=100, le=599)]
    """Of the answer; 499 = the client hung up."""
    latency_ms: _Milliseconds
    cached_tokens: _Count
    rows_requested: _Count
    rows_resident: _Count


class TraceGap(msgspec.Struct, frozen=True, array_like=True, tag="gap"):
    """Requests that the server took here and that could not be recorded."""

    lost: Annotated[int, Meta(ge=1, le=1 << 50)]


class TraceEnd(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """Nothing more was recorded."""

    reason: Literal["stopped", "size", "another engine"]
    """The server ended; the file has the size that it was allowed; a model was loaded whose pages
    or tables are not those of the header."""


TraceFrame = TraceRecord | TraceGap | TraceEnd


def framed(payload: bytes) -> bytes:
    """A payload as the file has it."""
    check = zlib.crc32(payload)
    return len(payload).to_bytes(4, "little") + check.to_bytes(4, "little") + payload


@dataclass(slots=True)
class TraceFile:
    """What is in a file."""

    path: Path
    header: TraceHeader
    records: list[TraceRecord] = field(default_factory=list)
    lost: int = 0
    """Requests that could not be recorded."""
    end: str | None = None
    """Why nothing follows; None = the server did not end in order, or still runs."""
    torn_at: int | None = None
    """Byte where a frame begins that is not there in full: the last one of a server that died."""


def read_trace_file(path: Path) -> TraceFile:
    """Reads a file; a torn last frame is left out.

    Raises:
        ValueError: it cannot be read, is none, or is damaged; names the file and the place.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


class _Frame(NamedTuple):
    """A payload and the byte where its frame begins."""

    at: int
    payload: bytes | None
    """None = it is not there in full."""


def _read(path: Path, file: BufferedReader) -> TraceFile:
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError(f"{path}: is no trace: it does not begin with {MAGIC.decode().strip()!r}")
    frames = _frames(path, file)
    first = next(frames, None)
    if first is None or first.payload is None:
        raise ValueError(f"{path}: byte {len(MAGIC)}: the header is not there in full")
    found = TraceFile(path, _decoded(path, first, TraceHeader))
    for frame in frames:
        if found.end is not None:
            raise ValueError(f"{path}: byte {frame.at}: something follows the end")
        if frame.payload is None:
            found.torn_at = frame.at
            break
        said: TraceFrame = _decoded(path, frame, TraceFrame)
        if isinstance(said, TraceRecord):
            found.records.append(said)
        elif isinstance(said, TraceGap):
            found.lost += said.lost
        else:
            found.end = said.reason
    return found


def _frames(path: Path, file: BufferedReader) -> Iterator[_Frame]:
    at = file.tell()
    while head := file.read(FRAME_BYTES):
        length, check = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:], "little")
        if len(head) == FRAME_BYTES and length > MAX_FRAME_BYTES:
            raise ValueError(
                f"{path}: byte {at}: is damaged: a frame of {length} bytes, the limit is "
                f"{MAX_FRAME_BYTES}"
            )
        payload = file.read(length)
        # After a power cut a file may end in zeros, which would be an empty frame.
        if len(head) < FRAME_BYTES or len(payload) < length or not length:
            yield _Frame(at, None)
            return
        if zlib.crc32(payload) != check:
            raise ValueError(f"{path}: byte {at}: is damaged: the checksum of a frame is wrong")
        yield _Frame(at, payload)
        at += FRAME_BYTES + length


def _decoded(path: Path, frame: _Frame, kind: Any) -> Any:
    assert frame.payload is not None
    try:
        return msgspec.msgpack.decode(frame.payload, type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: byte {frame.at}: {error}") from error
