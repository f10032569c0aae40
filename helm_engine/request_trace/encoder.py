"""From a request to its record: ids hashed with a key that nobody keeps, contexts written once."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from block_manager.block_hash import BLOCK_HASH_BYTES, NO_USER_TAG
from helm_engine.request import Request
from helm_engine.request_trace.file_format import (
    MAX_MILLISECONDS,
    MAX_PRIORITY,
    TraceHeader,
    TraceRecord,
)
from helm_engine.request_trace.siphash import SipKey, hashed_ids
from helm_engine.served_model import ServedModel
from helm_engine.version import __version__
from model_executor.capabilities import step_rules
from model_executor.step import NO_ROW

Int64Array = npt.NDArray[np.int64]

_MAX_KEPT_BLOCKS = 1 << 22
"""Hashed ids of blocks that are kept to find what contexts share: 32 MiB."""
_MIN_KEPT_BLOCKS = 64
"""A user counts as so many at least."""


class Taken(NamedTuple):
    """A request that has ended, and how."""

    request: Request
    at: float
    """Seconds after the start."""
    status: int
    latency_ms: float


class _Known(NamedTuple):
    """A user's last record."""

    number: int
    blocks: Int64Array


def header_of(served: ServedModel) -> TraceHeader:
    """What a trace says of the engine that took its requests."""
    config, layout, model = served.config, served.layout, served.model_config
    rules = step_rules(model, served.capabilities)
    scheduler = config.scheduler
    return TraceHeader(
        engine_version=__version__,
        pool_bytes=config.pool.pool_bytes,
        emb_fraction=config.pool.emb_fraction,
        block_tokens=layout.block_tokens,
        row_bytes=layout.row_bytes,
        kv_bytes_per_token=model.kv_elements_per_token * config.executor.kv_number_bytes,
        num_rows=model.num_rows,
        max_context_tokens=model.max_context_tokens,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_waiting=scheduler.max_num_waiting,
        max_pages_per_step=scheduler.max_pages_per_step,
        patience_ms=scheduler.patience_ms,
        chunkable=rules.chunkable,
        microbatch_unit=rules.microbatch_unit,
        recomputes_last_row=rules.recomputes_last_row,
        shortest_context=rules.shortest_context,
        refill_bytes_per_second=config.host_tier.refill_bytes_per_second,
        link_bytes_per_second=config.host_tier.link_bytes_per_second,
        slo_ms=config.controller.slo_ms,
        controller=config.controller.name,
        profile=served.cost_profile,
    )


class TraceEncoder:
    """Makes records of one file; they have to be written in the order in which they are made."""

    def __init__(self, block_tokens: int, secret: bytes | None = None) -> None:
        """Draws the file's key.

        Args:
            block_tokens: tokens of a block.
            secret: 16 bytes instead of drawn ones, for a test.
        """
        self._key = SipKey.of(secret or secrets.token_bytes(16))
        self._block_tokens = block_tokens
        self._known: OrderedDict[int, _Known] = OrderedDict()
        self._num_kept = 0
        self._number = 0
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, taken: Taken) -> bytes:
        """The payload of the next record."""
        record = self._record(taken)
        self._number += 1
        return self._encoder.encode(record)

    def _record(self, taken: Taken) -> TraceRecord:
        request, tokens = taken.request, taken.request.tokens
        user = self._user(request.user_tag)
        blocks = self._blocks(request)
        base, shared = self._shared(user, blocks)
        deadline = (request.deadline - request.arrival) * 1e3
        # What a client may ask for goes further than what the file can say.
        is_limit = deadline <= MAX_MILLISECONDS
        return TraceRecord(
            at=taken.at,
            user=user,
            base=base,
            shared_blocks=shared,
            num_tokens=request.num_tokens,
            blocks=_packed(blocks[shared:]),
            rows=_packed(self._rows(tokens.rows[shared * self._block_tokens :])),
            candidates=_packed(self._rows(tokens.candidate_rows)),
            deadline_ms=max(0.0, deadline) if is_limit else None,
            priority=min(max(request.priority, -MAX_PRIORITY), MAX_PRIORITY),
            status=taken.status,
            latency_ms=min(max(0.0, taken.latency_ms), MAX_MILLISECONDS),
            cached_tokens=request.cached_tokens,
            rows_requested=request.rows_requested,
            rows_resident=request.rows_resident,
        )

    def _user(self, tag: int) -> int:
        if tag == NO_USER_TAG:
            return 0
        # Three words: no message of another kind is as long.
        words = np.array([[tag, 0, 0]], dtype=np.uint64)
        return max(1, int(hashed_ids(words, self._key)[0]))

    def _rows(self, rows: Int64Array) -> Int64Array:
        """One word each; the rows of all tables are numbered through."""
        hashed = hashed_ids(rows.view(np.uint64).reshape(-1, 1), self._key)
        hashed[rows == NO_ROW] = NO_ROW
        return hashed

    def _blocks(self, request: Request) -> Int64Array:
        """Two words of each block's own hash."""
        hashes = np.frombuffer(b"".join(request.block_hashes), dtype="<u8")
        words = hashes.reshape(-1, BLOCK_HASH_BYTES // 8)[:, :2]
        return hashed_ids(words, self._key)

    def _shared(self, user: int, blocks: Int64Array) -> tuple[int, int]:
        """An earlier record of the user, and how many blocks both begin with; keeps this one."""
        if not user or not len(blocks):
            return -1, 0
        known = self._known.pop(user, None)
        base, shared = -1, 0
        if known is not None:
            self._num_kept -= max(_MIN_KEPT_BLOCKS, len(known.blocks))
            both = min(len(blocks), len(known.blocks))
            differ = np.flatnonzero(known.blocks[:both] != blocks[:both])
            shared = int(differ[0]) if len(differ) else both
            base = known.number if shared else -1
        self._known[user] = _Known(self._number, blocks)
        self._num_kept += max(_MIN_KEPT_BLOCKS, len(blocks))
        while self._num_kept > _MAX_KEPT_BLOCKS:
            _, oldest = self._known.popitem(last=False)
            self._num_kept -= max(_MIN_KEPT_BLOCKS, len(oldest.blocks))
        return base, shared


def _packed(ids: Int64Array) -> bytes:
    return ids.astype("<i8", copy=False).tobytes()
