"""Follows the events of one engine over ZeroMQ and hands them on in sequence.

Batches of a topic are numbered. One that is out of turn was lost, came twice, or is of an engine
that was started anew; the engine is asked for what it published since, and if it cannot tell, all
that was known of it is forgotten and asked for in whole. Now and then the engine is asked for what
follows the last batch known: so neither the loss of its latest batch nor a restart goes unnoticed
for long. By its time a batch is told from another of the same number.

The format is that of vLLM 0.32's publisher, so that its engines can be followed too. They give no
snapshots: what they published before their buffer begins stays unknown.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from threading import Lock, Thread
from typing import NamedTuple, Protocol

import zmq

from block_manager.events import (
    ROWS_REQUEST,
    ROWS_TOPIC,
    SEQUENCE_BYTES,
    SNAPSHOT_REQUEST,
    KVEventBatch,
    RowEventBatch,
)
from router.event_decoding import decode_kv, decode_rows

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""An engine is asked this often whether anything was missed."""
ANSWER_SECONDS = 5.0
"""One that does not answer within so long is forgotten until it does."""

_CLOSE = b"close"
_RESYNC = b"resync"


class ResidencySink(Protocol):
    """What takes events of named engines; `Residency` is one. Called on subscribers' threads."""

    def apply_kv(self, name: str, batch: KVEventBatch) -> None:
        """Blocks became reusable on an engine, and blocks went, in order."""
        ...

    def apply_rows(self, name: str, batch: RowEventBatch) -> None:
        """Positions of the engine's row digest changed."""
        ...

    def forget(self, name: str) -> None:
        """Nothing is known of the engine any more; events of all it holds may follow."""
        ...


@dataclass(slots=True)
class SubscriberStats:
    """Totals since the start."""

    batches: int = 0
    """Handed on."""
    gaps: int = 0
    """Batches that were out of turn because others were missing."""
    resyncs: int = 0
    """Times that the engine was forgotten and asked for everything; the first is not one."""


class _Message(NamedTuple):
    topic: bytes
    number: int
    payload: bytes


@dataclass(slots=True)
class _Stream:
    """Where one topic of the engine stands."""

    decode: Callable[[bytes], KVEventBatch | RowEventBatch]
    apply: Callable[..., None]
    request: tuple[bytes, ...]
    """Behind a first number, which topic's batches are asked for."""
    next: int | None = None
    """Number of the batch to come; None = any may be the first."""
    last_ts: float = -inf
    """Of the batch before it."""

    def expects(self, number: int) -> bool:
        """Whether a batch is the one to come."""
        return self.next is None or number == self.next


class _ClosedError(Exception):
    """The thread is to end."""


class _NoAnswerError(Exception):
    """The engine does not answer."""


class EventSubscriber:
    """Reads an engine's events on a thread of its own and calls a sink there."""

    def __init__(
        self,
        name: str,
        endpoint: str,
        replay_endpoint: str | None,
        sink: ResidencySink,
        *,
        check_seconds: float = CHECK_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        """Begins to listen; an engine that is not there yet is waited for.

        Args:
            name: of the engine, as the sink knows it.
            endpoint: address that the engine has bound and publishes on.
            replay_endpoint: that it answers on; None = whenever anything was missed, the engine is
                forgotten, and what it holds becomes known by later events only.
            sink: is called on the subscriber's thread, never after `close`.
            check_seconds: time from one question for missed batches to the next.
            answer_seconds: an engine that does not answer for so long is forgotten.

        Raises:
            ValueError: an address cannot be used.
        """
        self.stats = SubscriberStats()
        self._name = name
        self._sink = sink
        self._replay_endpoint = replay_endpoint
        self._check_seconds = check_seconds
        self._answer_seconds = answer_seconds
        self._kv = _Stream(decode_kv, sink.apply_kv, ())
        self._rows = _Stream(decode_rows, sink.apply_rows, (ROWS_REQUEST,))
        self._is_synced = False
        self._wants_resync = False
        self._check_at = -inf
        self._context = zmq.Context()
        try:
            self._open_sockets(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            addresses = ", ".join(filter(None, (endpoint, replay_endpoint)))
            raise ValueError(f"events of {name}: {addresses} cannot be used: {error}") from error
        self._thread = Thread(target=self._run, name=f"events of {name}", daemon=True)
        self._thread.start()

    def _open_sockets(self, endpoint: str) -> None:
        self._orders = self._context.socket(zmq.PAIR)
        self._orders.bind("inproc://orders")
        self._order_lock = Lock()
        self._order = self._context.socket(zmq.PAIR)
        self._order.connect("inproc://orders")
        self._events = self._context.socket(zmq.SUB)
        self._events.set_hwm(0)
        self._events.subscribe(b"")
        # A connection that broke is the first sign of an engine that is started anew.
        self._breaks = self._events.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._events.connect(endpoint)
        self._asker = self._open_asker()

    def _open_asker(self) -> zmq.Socket[bytes]:
        """A socket that more than one message may answer; REQ would take a single one."""
        asker = self._context.socket(zmq.DEALER)
        asker.set_hwm(0)
        asker.linger = 0
        if self._replay_endpoint is not None:
            asker.connect(self._replay_endpoint)
        return asker

    @property
    def is_synced(self) -> bool:
        """Whether the sink was told everything, up to what is on its way."""
        return self._is_synced

    @property
    def num_kv_batches(self) -> int:
        """KV batches that the engine had published by the last one known; 0 = none is known."""
        return self._kv.next or 0

    def resync(self) -> None:
        """Asks for everything anew, for instance after the engine was forgotten elsewhere."""
        self._tell(_RESYNC)

    def close(self) -> None:
        """Ends the thread; what the sink knows stays."""
        self._tell(_CLOSE)
        self._thread.join()
        self._context.destroy(linger=0)

    def _tell(self, order: bytes) -> None:
        with self._order_lock, suppress(zmq.Again):  # The thread may have ended.
            self._order.send(order, zmq.NOBLOCK)

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            self._start_anew()
            while True:
                self._wait()
        except _ClosedError:
            pass
        except Exception:
            logger.exception("events of %s are no longer read", self._name)
            self._sink.forget(self._name)
        finally:
            self._is_synced = False
            self._events.disable_monitor()
            for socket in (self._events, self._breaks, self._asker, self._orders):
                socket.close(linger=0)

    def _wait(self) -> None:
        """Waits until there is something to do, and does it."""
        has_asker = self._replay_endpoint is not None
        until = self._check_at if has_asker else inf
        ready = self._poll(until, self._events, self._breaks)
        if self._breaks in ready:
            _drain(self._breaks)
            # Before the next batch: it may be another engine's.
            self._check_at = -inf
            self._wants_resync |= not has_asker
        if self._wants_resync:
            self._resync()
        elif has_asker and time.monotonic() >= self._check_at:
            self._check()
        elif self._events in ready:
            self._take(self._events.recv_multipart())

    def _poll(self, until: float, *sockets: zmq.Socket[bytes]) -> set[zmq.Socket[bytes]]:
        """Waits for any of the sockets, and for orders, until a time; returns those that are ready.

        Raises:
            _ClosedError: that is an order.
        """
        poller = zmq.Poller()
        for socket in (self._orders, *sockets):
            poller.register(socket, zmq.POLLIN)
        left = max(0.0, until - time.monotonic())
        ready = {socket for socket, _ in poller.poll(None if left == inf else int(1e3 * left))}
        if self._orders in ready:
            if self._orders.recv() == _CLOSE:
                raise _ClosedError
            self._wants_resync = True
        return ready

    # ---------------------------------------------------------------- batches

    def _take(self, frames: list[bytes]) -> None:
        """Takes a published message."""
        message = _message(frames)
        if message is None:
            logger.warning("events of %s: a message of %d frames", self._name, len(frames))
            return
        stream = self._stream_of(message)
        try:
            batch = stream.decode(message.payload)
        except ValueError as error:
            logger.warning("events of %s: a batch cannot be read: %s", self._name, error)
            self._resync()
            return
        if stream.next is not None and message.number > stream.next:
            self.stats.gaps += 1
            self._check()
        elif not stream.expects(message.number) and batch.ts > stream.last_ts:
            logger.info("events of %s begin again", self._name)
            self._resync()
        # After either it may have been handed on already.
        if stream.expects(message.number):
            self._hand_on(stream, message.number, batch)

    def _stream_of(self, message: _Message) -> _Stream:
        return self._rows if message.topic.startswith(ROWS_TOPIC.encode()) else self._kv

    def _hand_on(self, stream: _Stream, number: int, batch: KVEventBatch | RowEventBatch) -> None:
        stream.next, stream.last_ts = number + 1, batch.ts
        self.stats.batches += 1
        try:
            stream.apply(self._name, batch)
        except ValueError as error:
            logger.error("events of %s cannot be used: %s", self._name, error)

    # ---------------------------------------------------------------- what was missed

    def _check(self) -> None:
        """Asks for what came after the last batch; starts anew where the engine cannot tell."""
        try:
            known = [stream for stream in (self._kv, self._rows) if stream.next is not None]
            if self._is_synced and all([self._catch_up(stream) for stream in known]):
                self._check_at = time.monotonic() + self._check_seconds
                return
        except _NoAnswerError:
            pass
        self._resync()

    def _catch_up(self, stream: _Stream) -> bool:
        """Whether the engine's last batch was the last one known, or all after that one came."""
        assert stream.next is not None
        known = stream.next
        number = max(0, known - 1)
        for message in self._ask(_number(number), *stream.request):
            if message.number != number:
                return False
            try:
                batch = stream.decode(message.payload)
            except ValueError:
                return False
            if number >= known:
                self._hand_on(stream, number, batch)
            elif batch.ts != stream.last_ts:
                return False  # Another batch of that number: the engine was started anew.
            number += 1
        return number >= known

    def _resync(self) -> None:
        self.stats.resyncs += 1
        self._start_anew()

    def _start_anew(self) -> None:
        """Forgets the engine and asks for all it holds."""
        self._sink.forget(self._name)
        self._wants_resync = self._is_synced = False
        for stream in (self._kv, self._rows):
            stream.next, stream.last_ts = None, -inf
        if self._replay_endpoint is None:
            return
        try:
            # A snapshot, or from an engine that gives none what it published, as far as it goes.
            answer = self._ask(SNAPSHOT_REQUEST) or self._ask(_number(0))
            self._is_synced = self._take_all(answer)
        except _NoAnswerError:
            pass
        self._check_at = time.monotonic() + self._check_seconds

    def _take_all(self, answer: list[_Message]) -> bool:
        """Hands on an answer of all that is there; whether nothing is missing in it."""
        for message in answer:
            stream = self._stream_of(message)
            # The batches of a snapshot have one number.
            if stream.next is not None and message.number not in (stream.next - 1, stream.next):
                return False
            try:
                self._hand_on(stream, message.number, stream.decode(message.payload))
            except ValueError as error:
                logger.warning("events of %s: a batch cannot be read: %s", self._name, error)
                return False
        return True

    def _ask(self, *request: bytes) -> list[_Message]:
        """All messages of the engine's answer.

        Raises:
            _NoAnswerError: none came for too long.
        """
        self._asker.send_multipart((b"", *request))
        answer: list[_Message] = []
        while True:
            ready = self._poll(time.monotonic() + self._answer_seconds, self._asker)
            if self._asker in ready:
                message = _message(self._asker.recv_multipart()[1:])
                if message is not None and not message.payload:
                    return answer
                answer += [] if message is None else [message]
            elif not ready:
                # What may still come would be taken for the answer to a later question.
                self._asker.close(linger=0)
                self._asker = self._open_asker()
                raise _NoAnswerError


def _message(frames: list[bytes]) -> _Message | None:
    """Topic, number and payload; None where they are not there."""
    if len(frames) != 3 or len(frames[1]) != SEQUENCE_BYTES:
        return None
    return _Message(frames[0], int.from_bytes(frames[1], "big", signed=True), frames[2])


def _number(value: int) -> bytes:
    return value.to_bytes(SEQUENCE_BYTES, "big")


def _drain(socket: zmq.Socket[bytes]) -> None:
    with suppress(zmq.Again):
        while True:
            socket.recv_multipart(zmq.NOBLOCK)
