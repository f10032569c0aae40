"""What a simulated engine tells routers of its pool: the messages that a real one publishes."""

from __future__ import annotations

from typing import NamedTuple

from block_manager.events import KVEventBatch, RowEventBatch
from block_manager.kv_event_log import KvEventLog, events_of
from block_manager.row_digest import RowDigest
from block_manager.row_log import RowLog
from helm_engine.config import ResidencyConfig
from helm_engine.scheduler import Scheduler


class Batches(NamedTuple):
    """What happened to both tenants since the last time; None where nothing did."""

    kv: KVEventBatch | None
    rows: RowEventBatch | None


class EngineEvents:
    """Listens to an engine's pool from its beginning on."""

    def __init__(self, scheduler: Scheduler, kv: bool = True, rows: bool = True) -> None:
        """Begins to listen to the tenants that somebody wants to know of; the pool is empty."""
        self._block_tokens = scheduler.kv.block_tokens
        self._blocks = KvEventLog() if kv else None
        self._rows = RowLog() if rows else None
        limit = ResidencyConfig().digest_positions
        self._digest = RowDigest(scheduler.emb.num_rows, limit) if rows else None
        scheduler.kv.pool.event_log = self._blocks
        scheduler.emb.row_log = self._rows

    @property
    def num_positions(self) -> int:
        """Of the row digest; 0 = rows are not told of."""
        return 0 if self._digest is None else self._digest.num_positions

    def take(self, now: float) -> Batches:
        """Everything since the last call; items are left out, as `--kv-events-redact` does."""
        kv, rows = None, None
        if self._blocks is not None and (changes := self._blocks.take()):
            kv = KVEventBatch(now, events_of(changes, self._block_tokens, redact=True))
        if self._rows is not None and self._digest is not None:
            traffic = self._rows.take()
            if traffic.came or traffic.went:
                events = self._digest.change(traffic).events()
                rows = RowEventBatch(now, events, self._digest.num_positions)
        return Batches(kv, rows)
