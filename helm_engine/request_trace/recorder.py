"""Writes down what a server takes, on a thread of its own: who serves waits for nothing here.

What does not fit into the queue, or onto the disk, is not recorded; it is counted, and the log and
the metrics say so.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

import msgspec

from helm_engine.clock import Clock, SystemClock
from helm_engine.exceptions import HelmError
from helm_engine.request import Request
from helm_engine.request_trace.encoder import Taken, TraceEncoder, header_of
from helm_engine.request_trace.file_format import (
    MAGIC,
    TraceEnd,
    TraceGap,
    TraceHeader,
    framed,
)
from helm_engine.served_model import ServedModel

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""As nginx calls it: the client hung up before there was an answer."""

_MAX_QUEUED_TOKENS = 1 << 22
"""Tokens and candidates of requests that wait to be written; more would only take memory."""
_REQUEST_TOKENS = 64
"""A request counts as so many more."""
_BATCH_S = 0.05
"""Requests that come within so long are written together."""
_LONGEST_END_S = 10.0
"""That a server which stops waits for the disk."""
_LAST_BYTES = 256
"""Kept free for the frames that end a file."""


class TraceRecorder:
    """One file; requests are handed over on the event loop."""

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        clock: Clock | None = None,
        max_queued_tokens: int = _MAX_QUEUED_TOKENS,
    ) -> None:
        """Makes the file.

        Args:
            path: of a file that is not there yet: its key is gone, so none can be continued.
            max_bytes: the file grows no larger.
            clock: that of the requests' arrivals.
            max_queued_tokens: requests that would make more wait are lost.

        Raises:
            ValueError: it is there, or cannot be made.
        """
        self._max_bytes = max_bytes
        self._max_queued_tokens = max_queued_tokens
        self._clock = clock or SystemClock()
        self._path = path
        try:
            # What people looked at is nobody else's business.
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise ValueError(f"record_trace: {path} is there already; name another file") from error
        except OSError as error:
            raise ValueError(f"record_trace: {path}: {error.strerror}") from error
        self._queue: queue.SimpleQueue[Taken | TraceEnd] = queue.SimpleQueue()
        self._tokens_put = self._tokens_done = 0
        self._num_bytes = 0
        self._served: tuple[ServedModel, ...] = ()
        """Whose header is the file's: while a server reloads there are two at a time."""
        self._header: TraceHeader | None = None
        self._began = 0.0
        self._is_open = self._is_closed = False
        self.num_recorded = 0
        """Requests in the file."""
        self._num_refused = 0
        """Requests that were not queued; the event loop counts them."""
        self._num_noted = 0
        """Those of them that the file knows of."""
        self._num_unwritten = 0
        """Requests that were queued and are not in the file; the thread counts them."""
        self._thread = threading.Thread(target=self._run, name="trace-recorder", daemon=True)

    @property
    def num_lost(self) -> int:
        """Requests that are not in the file."""
        return self._num_refused + self._num_unwritten

    # ------------------------------------------------------------ on the event loop

    def begin(self, served: ServedModel) -> None:
        """Time counts from now on; the engine is the one that the header describes.

        Raises:
            ValueError: the header cannot be written.
        """
        self._header = header_of(served)
        self._began = self._clock.now()
        self._encoder = TraceEncoder(self._header.block_tokens)
        try:
            self._append(MAGIC + framed(msgspec.msgpack.encode(self._header)))
        except OSError as error:
            raise ValueError(f"record_trace: {self._path}: {error.strerror}") from error
        self._served = (served,)
        self._is_open = True
        self._thread.start()

    async def follow(
        self, running: Awaitable[Request], request: Request, served: ServedModel
    ) -> Request:
        """Waits for a request as its client does, and records it whatever becomes of it."""
        status = CLIENT_LEFT
        try:
            # With several engines the one that was answered may be a copy.
            request = await running
            status = 200
            return request
        except HelmError as error:
            status = error.status
            raise
        except Exception:
            status = HelmError.status
            raise
        finally:
            self._take(request, status, served)

    def _take(self, request: Request, status: int, served: ServedModel) -> None:
        tokens = _weight(request)
        # Each count has one writer, so their difference needs no lock.
        is_full = self._tokens_put - self._tokens_done + tokens > self._max_queued_tokens
        if not self._is_open or is_full or not self._is_same_engine(served):
            self._num_refused += 1
            return
        self._tokens_put += tokens
        late_ms = (self._clock.now() - request.arrival) * 1e3
        self._queue.put(Taken(request, request.arrival - self._began, status, late_ms))

    def _is_same_engine(self, served: ServedModel) -> bool:
        """Whether the header still holds; after a reload it may not."""
        if not any(served is known for known in self._served):
            if header_of(served) != self._header:
                logger.warning("%s: a model of other pages or tables is served", self._path)
                self._is_open = False
                self._queue.put(TraceEnd("another engine"))
                return False
            self._served = (served, self._served[0])
        return True

    def close(self) -> None:
        """Writes what waits, and ends the file; waits for a slow disk, but not for ever.

        A file in which nothing was begun is removed: it would be in the way of the next start.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if not self._served:
            os.close(self._descriptor)
            self._path.unlink(missing_ok=True)
            return
        self._is_open = False
        self._queue.put(TraceEnd("stopped"))
        self._thread.join(_LONGEST_END_S)
        if self._thread.is_alive():
            logger.warning("%s: the disk does not answer, the end is not written", self._path)
        elif self.num_lost:
            logger.warning("%s: %d requests were not recorded", self._path, self.num_lost)

    # ------------------------------------------------------------ on the thread

    def _run(self) -> None:
        try:
            while self._write_batch():
                pass
        except OSError as error:
            logger.warning("%s: requests are no longer recorded: %s", self._path, error.strerror)
        except Exception:
            # Whatever it is, the server goes on.
            logger.exception("%s: requests are no longer recorded", self._path)
        finally:
            self._is_open = False
            os.close(self._descriptor)
            # What came since waits for nobody.
            self._num_unwritten += sum(isinstance(one, Taken) for one in self._waiting())

    def _write_batch(self) -> bool:
        """Writes what has come; False = that was the last."""
        batch: list[Taken | TraceEnd] = [self._queue.get()]
        if isinstance(batch[0], Taken):
            time.sleep(_BATCH_S)
        batch += self._waiting()
        coming = sum(isinstance(one, Taken) for one in batch)
        try:
            requests, end = self._write(batch)
        except Exception:
            self._num_unwritten += coming
            raise
        self._num_unwritten += coming - requests
        self.num_recorded += requests
        self._tokens_done += sum(_weight(one.request) for one in batch if isinstance(one, Taken))
        return end is None

    def _write(self, batch: list[Taken | TraceEnd]) -> tuple[int, TraceEnd | None]:
        """How many requests of a batch were written before the file's end, and that end."""
        frames: list[bytes] = []
        num_bytes, end = self._num_bytes, None
        for one in batch:
            if isinstance(one, TraceEnd):
                end = one
                break
            frame = framed(self._encoder.encode(one))
            num_bytes += len(frame)
            if num_bytes > self._max_bytes - _LAST_BYTES:
                end = TraceEnd("size")
                logger.warning("%s: has the size that it may have", self._path)
                break
            frames.append(frame)
        requests = len(frames)
        frames += [self._gap(), b"" if end is None else _frame(end)]
        self._append(b"".join(frames))
        return requests, end

    def _waiting(self) -> list[Taken | TraceEnd]:
        """All that is in the queue."""
        found = []
        with suppress(queue.Empty):
            while True:
                found.append(self._queue.get_nowait())
        return found

    def _gap(self) -> bytes:
        """A note on the requests that were lost since the last one."""
        lost = self._num_refused - self._num_noted
        self._num_noted += lost
        return _frame(TraceGap(lost)) if lost else b""

    def _append(self, frames: bytes) -> None:
        """Adds whole frames or, where the disk has no room for them, none."""
        rest = memoryview(frames)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, self._num_bytes)
            raise
        self._num_bytes += len(frames)


def _frame(note: TraceGap | TraceEnd) -> bytes:
    return framed(msgspec.msgpack.encode(note))


def _weight(request: Request) -> int:
    """What a request counts in the queue."""
    return request.num_tokens + request.num_candidates + _REQUEST_TOKENS
