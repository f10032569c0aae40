"""Tells routers what the engine holds: events of KV and changes of the row digest, over ZeroMQ.

The step thread hands over arrays and goes on; a thread of its own makes messages of them, publishes
them and answers those who missed some. It waits for nobody: a subscriber that does not read loses
messages, sees a gap in the numbers and asks for a replay, or for a snapshot of everything.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import inf

import numpy as np
import zmq

from block_manager.block_hash_map import KeyWords
from block_manager.embedding_cache import EmbeddingCache
from block_manager.events import (
    ROWS_REQUEST,
    SNAPSHOT_REQUEST,
    KVEventBatch,
    RowEventBatch,
    kv_topic,
    rows_topic,
)
from block_manager.kv_cache_manager import KVCacheManager
from block_manager.kv_event_log import KvChange, KvEventLog, events_of, snapshot_events
from block_manager.row_digest import RowDigest, RowEvent
from block_manager.row_log import RowLog, RowParts, RowTraffic
from helm_engine.config import ResidencyConfig
from helm_engine.event_stream import END_OF_ANSWER, EventStream, Frames

logger = logging.getLogger(__name__)

_ANY_PORT = ":*"
"""The system chooses; the address that others need is in `ResidencyPublisher.config`."""
_BIND_AGAIN_SECONDS = 0.2
_MAX_UNSENT = 100_000
"""Messages that wait for a subscriber that does not read; vLLM's default."""


@dataclass(frozen=True, slots=True)
class _Report:
    """What happened since the last one."""

    ts: float
    kv: list[KvChange]
    rows: RowTraffic
    cached: KeyWords | None
    """All that is reusable after it, where somebody asked for that."""


class ResidencyPublisher:
    """Publishes what both tenants note; `report` is for the thread that steps."""

    def __init__(
        self, config: ResidencyConfig, model_name: str, kv: KVCacheManager, emb: EmbeddingCache
    ) -> None:
        """Opens the sockets and lets the tenants note what comes and goes.

        Args:
            config: has an endpoint.
            model_name: for the topics.
            kv: nothing is reusable yet.
            emb: its resident rows are told first.

        Raises:
            ValueError: an address cannot be used; one that is in use is waited for, since the
                engine that this one replaces may hold it still.
        """
        if config.endpoint is None:
            raise ValueError("kv_events_endpoint: must be given")
        self._config = config
        self._block_tokens = kv.block_tokens
        self._pool, self._emb = kv.pool, emb
        self._kv_log, self._row_log = KvEventLog(), RowLog()
        self._digest = RowDigest(emb.num_rows, config.digest_positions)
        engine = config.name
        self._kv_stream = EventStream(kv_topic(engine, model_name), config.buffer_batches)
        self._row_stream = EventStream(rows_topic(engine, model_name), config.buffer_batches)
        self._reports: deque[_Report] = deque()
        self._snapshot_wanted = threading.Event()
        self._is_over = False
        # All below belongs to the thread once it runs, but for the end that wakes it.
        self._asked_snapshot: list[bytes] = []
        self._came: RowParts = []
        self._went: RowParts = []
        self._rows_due = -inf
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._unbound: list[tuple[zmq.Socket[bytes], str]] = []
        try:
            self._open_sockets(config.endpoint, config.replay_endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._pool.event_log, emb.row_log = self._kv_log, self._row_log
        self._row_log.came(np.flatnonzero(emb.slot_of_row >= 0))
        self._thread = threading.Thread(target=self._run, name="residency", daemon=True)
        self._thread.start()

    def _open_sockets(self, endpoint: str, replay_endpoint: str | None) -> None:
        self._published = self._context.socket(zmq.PUB)
        self._published.set_hwm(_MAX_UNSENT)
        if _is_bound(endpoint):
            endpoint = self._bind(self._published, endpoint, "kv_events_endpoint")
        else:
            with _named("kv_events_endpoint", endpoint):
                self._published.connect(endpoint)
        self._replay = self._context.socket(zmq.ROUTER)
        self._replay.set_hwm(0)  # An answer of more messages than that would lose its end.
        if replay_endpoint is not None:
            replay_endpoint = self._bind(self._replay, replay_endpoint, "kv_events_replay_endpoint")
        self._config = replace(self._config, endpoint=endpoint, replay_endpoint=replay_endpoint)
        self._woken = self._context.socket(zmq.PAIR)
        self._woken.bind("inproc://wake")
        self._wake = self._context.socket(zmq.PAIR)
        self._wake.connect("inproc://wake")

    def _bind(self, socket: zmq.Socket[bytes], endpoint: str, field: str) -> str:
        """Binds now or, where the address is in use, later; returns it with its real port."""
        with _named(field, endpoint):
            if not _try_to_bind(socket, endpoint):
                logger.warning("%s: %s is in use; it is tried again and again", field, endpoint)
                self._unbound.append((socket, endpoint))
            elif endpoint.endswith(_ANY_PORT):
                return socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return endpoint

    @property
    def config(self) -> ResidencyConfig:
        """As it was given, with the ports that the system chose where it gave `*` as a port."""
        return self._config

    @property
    def num_kv_batches(self) -> int:
        """KV batches published so far."""
        return self._kv_stream.num_batches

    # ---------------------------------------------------------------- the step thread

    def report(self) -> None:
        """Hands over what came and went since the last call; between steps."""
        if self._is_over:
            self._stop_noting()
            return
        kv, rows = self._kv_log.take(), self._row_log.take()
        cached = None
        if self._snapshot_wanted.is_set():
            self._snapshot_wanted.clear()
            cached = self._pool.cached_hashes()
        if kv or rows.came or rows.went or cached is not None:
            self._reports.append(_Report(time.time(), kv, rows, cached))
            self._wake_up()

    def close(self) -> None:
        """Ends the thread and closes the sockets; nothing is noted any more."""
        self._stop_noting()
        self._is_over = True
        self._wake_up()
        self._thread.join()
        self._context.destroy(linger=0)

    def _stop_noting(self) -> None:
        self._pool.event_log = self._emb.row_log = None

    def _wake_up(self) -> None:
        with suppress(zmq.Again):  # It has been told often enough, or has ended.
            self._wake.send(b"", zmq.NOBLOCK)

    # ---------------------------------------------------------------- the publisher's thread

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        poller.register(self._replay, zmq.POLLIN)
        try:
            while not self._is_over:
                ready = dict(poller.poll(self._milliseconds_to_wait()))
                if self._woken in ready:
                    _drain(self._woken)
                while self._reports:
                    self._publish(self._reports.popleft())
                if (self._came or self._went) and time.monotonic() >= self._rows_due:
                    self._publish_rows()
                if self._replay in ready:
                    self._answer_all()
                self._unbound = [one for one in self._unbound if not _try_to_bind(*one)]
        except Exception:
            # Routers then hear nothing, and the engine serves on.
            logger.exception("what the engine holds is no longer published")
        finally:
            self._is_over = True
            for socket in (self._published, self._replay, self._woken):
                socket.close(linger=0)

    def _milliseconds_to_wait(self) -> int | None:
        waits = [_BIND_AGAIN_SECONDS] if self._unbound else []
        if self._came or self._went:
            waits.append(max(0.0, self._rows_due - time.monotonic()))
        return int(1e3 * min(waits)) if waits else None

    def _publish(self, report: _Report) -> None:
        self._came += report.rows.came
        self._went += report.rows.went
        if report.kv:
            events = events_of(report.kv, self._block_tokens, self._config.redact)
            self._published.send_multipart(self._kv_stream.add(KVEventBatch(report.ts, events)))
        if report.cached is not None:
            self._answer_snapshot(report.cached)

    def _publish_rows(self) -> None:
        events = self._digest.change(RowTraffic(self._came, self._went)).events()
        self._came, self._went = [], []
        self._rows_due = time.monotonic() + self._config.digest_interval_s
        if events:
            self._published.send_multipart(self._row_stream.add(self._row_batch(events)))

    def _row_batch(self, events: list[RowEvent]) -> RowEventBatch:
        return RowEventBatch(time.time(), events, self._digest.num_positions)

    # ---------------------------------------------------------------- answers

    def _answer_all(self) -> None:
        while True:
            try:
                client, *request = self._replay.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if request == [b"", SNAPSHOT_REQUEST]:
                self._asked_snapshot.append(client)
                self._snapshot_wanted.set()
            elif len(request) == 2:
                self._answer_replay(client, self._kv_stream, request[1])
            elif len(request) == 3 and request[2] == ROWS_REQUEST:
                self._answer_replay(client, self._row_stream, request[1])
            else:
                logger.warning("a request for a replay has %d frames", len(request))

    def _answer_replay(self, client: bytes, stream: EventStream, first: bytes) -> None:
        self._answer(client, stream.since(int.from_bytes(first, "big")))

    def _answer_snapshot(self, cached: KeyWords) -> None:
        """All that is there after the last batch of each topic.

        Changes of rows that wait to be published are not in it and come with the next batch.
        """
        kv = [KVEventBatch(0.0, events) for events in snapshot_events(cached, self._block_tokens)]
        rows = [self._row_batch(events) for events in self._digest.snapshot_events()]
        frames = [*self._kv_stream.snapshot(kv), *self._row_stream.snapshot(rows)]
        for client in self._asked_snapshot:
            self._answer(client, frames)
        self._asked_snapshot = []

    def _answer(self, client: bytes, answer: Iterable[Frames]) -> None:
        for frames in answer:
            self._replay.send_multipart((client, b"", *frames))
        self._replay.send_multipart((client, b"", *END_OF_ANSWER))


def _is_bound(endpoint: str) -> bool:
    """Whether an engine binds an address, and does not connect to it: vLLM's rule."""
    return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))


def _try_to_bind(socket: zmq.Socket[bytes], endpoint: str) -> bool:
    """False where another has the address; other errors are raised."""
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


@contextmanager
def _named(field: str, endpoint: str) -> Iterator[None]:
    try:
        yield
    except zmq.ZMQError as error:
        raise ValueError(f"{field}: {endpoint!r} cannot be used: {error}") from error


def _drain(socket: zmq.Socket[bytes]) -> None:
    with suppress(zmq.Again):
        while True:
            socket.recv(zmq.NOBLOCK)
