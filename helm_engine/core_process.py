"""What runs in an engine core's own process: load, say so, step, answer, until told to stop."""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import zmq

from block_manager.refill import HostTraffic
from helm_engine.array_frames import FrameDecoder, FrameEncoder
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig
from helm_engine.engine_core import EngineCore
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.engine_messages import (
    AddRequest,
    Beat,
    CallDone,
    CoreReport,
    EndedRequest,
    ForgetUser,
    SetTarget,
    Stop,
    ToCore,
    WithdrawRequest,
)
from helm_engine.engine_stats import EngineStats
from helm_engine.exceptions import HelmError, RequestAbortedError
from helm_engine.request import Request

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.2
"""A core that runs or waits reports at least this often, between steps."""
BEAT_SECONDS = 0.1
"""And its process shows this often that it runs, during steps too."""
_BACKGROUND_SECONDS = 0.001
"""Without requests, pages and rows move in steps that are this far apart."""
_STALLED_SECONDS = 0.01
"""And these, where they wait for something: a refill on its way, the link's budget."""
_IDLE_CHECK_SECONDS = 1.0
"""Once the engine has had nothing to do for this long, it looks whether anything was leaked."""


_MAX_FAILED_STEPS = 20
"""Some errors of a device stay until its process ends: after so many the core gives up."""


@dataclass(frozen=True, slots=True)
class CoreAddresses:
    """ZeroMQ addresses of one core."""

    to_core: str
    """The core is bound to it."""
    from_core: str
    """The front is bound to it."""


def run_core_process(
    config: EngineConfig,
    addresses: CoreAddresses,
    front: Connection,
    log_level: int,
    load: Callable[[EngineConfig], LoadedEngine] | None = None,
) -> None:
    """Main function of the process.

    Sends one object through `front`: what is served (`ServedModel`), or the exception that kept
    the model from being loaded. When the front is gone, the process ends.

    Args:
        config: the engine's.
        addresses: of the sockets between core and front.
        front: the child's end of a pipe to the front.
        log_level: of Python's logging.
        load: loads the engine; `load_engine` by default.
    """
    # The front decides when the core ends: Ctrl-C in a terminal reaches both.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=log_level, format="%(levelname)s %(name)s: %(message)s")
    if config.executor.num_threads is not None:
        torch.set_num_threads(config.executor.num_threads)
    threading.Thread(target=_end_with, args=(front,), name="front-watch", daemon=True).start()
    try:
        engine = load(config) if load else load_engine(config, SystemClock())
    except Exception as error:
        logger.debug("the model could not be loaded", exc_info=True)
        front.send(_portable(error))
        return
    gc.collect()
    gc.freeze()
    published = engine.residency
    loop = _CoreLoop(
        engine.core,
        engine.runner.loader.traffic,
        addresses,
        lambda: 0 if published is None else published.num_kv_batches,
    )
    front.send(engine.served)
    loop.run()
    engine.close()
    # A core that lost track of a page must not end as if all had been well.
    engine.core.check_integrity()


def _end_with(front: Connection) -> None:
    """Ends this process with the front, however that ended: its end of the pipe is closed then."""
    try:
        front.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """An error of the operator's (a file, a setting) as it is; of any other the text."""
    if isinstance(error, ValueError | OSError | HelmError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


_Command = Request | WithdrawRequest | ForgetUser | SetTarget | Stop
"""A message as the step loop carries it out."""


class _CoreLoop:
    """Steps the engine between messages; sockets are read on a thread of their own."""

    def __init__(
        self,
        core: EngineCore,
        traffic: HostTraffic,
        addresses: CoreAddresses,
        num_kv_batches: Callable[[], int],
    ) -> None:
        self._core = core
        self._traffic = traffic
        self._num_kv_batches = num_kv_batches
        self._context = zmq.Context()
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.connect(addresses.from_core)
        self._encoder = FrameEncoder()
        self._requests: dict[str, Request] = {}
        self._calls_done: list[CallDone] = []
        self._last_said = 0.0
        inbox = self._context.socket(zmq.PULL)
        inbox.set_hwm(0)
        inbox.setsockopt(zmq.RCVTIMEO, int(1e3 * BEAT_SECONDS))
        inbox.bind(addresses.to_core)
        beats = self._context.socket(zmq.PUSH)
        beats.set_hwm(0)
        beats.connect(addresses.from_core)
        threading.Thread(
            target=self._read, args=(inbox, beats), name="core-inbox", daemon=True
        ).start()

    def _read(self, inbox: zmq.Socket[bytes], beats: zmq.Socket[bytes]) -> None:
        decoder: FrameDecoder[ToCore] = FrameDecoder(ToCore)
        beat = FrameEncoder().encode(Beat())
        last_beat = 0.0
        try:
            while True:
                now = time.monotonic()
                if now - last_beat >= BEAT_SECONDS:
                    beats.send_multipart(beat)
                    last_beat = now
                with suppress(zmq.Again):
                    frames = [frame.buffer for frame in inbox.recv_multipart(copy=False)]
                    message = decoder.decode(frames)
                    # Unpacked here, beside the running step, and not between two steps.
                    self._inbox.put(
                        message.request() if isinstance(message, AddRequest) else message
                    )
        except Exception:
            # A core that steps and hears nothing would look healthy for ever.
            logger.exception("messages of the front cannot be read")
            os._exit(1)

    def run(self) -> None:
        """Runs until `Stop` comes."""
        idle_since = time.monotonic()
        checked = False
        while True:
            if self._core.has_work:
                if not self._step(wait=0.0):
                    return
                idle_since, checked = time.monotonic(), False
            elif self._core.has_background_work:
                moves = self._core.made_progress
                if not self._step(_BACKGROUND_SECONDS if moves else _STALLED_SECONDS):
                    return
            else:
                if not self._take_messages(wait=HEARTBEAT_SECONDS):
                    return
                self._core.report_residency()
                self._core.control_boundary()
                self._say([])
                if not checked and time.monotonic() - idle_since > _IDLE_CHECK_SECONDS:
                    self._core.check_nothing_leaked()
                    checked = True

    def _step(self, wait: float) -> bool:
        """Steps once, then waits so long for messages and carries them out; False = stop."""
        ended = self._core.step()
        if self._core.failed_in_a_row >= _MAX_FAILED_STEPS:
            raise RuntimeError(f"{_MAX_FAILED_STEPS} steps in a row have failed")
        if not self._take_messages(wait):
            return False
        self._say(ended)
        return True

    def _take_messages(self, wait: float) -> bool:
        """Carries out what came in, waiting so many seconds for it; False = stop."""
        try:
            message = self._inbox.get(wait > 0, wait)
            while not isinstance(message, Stop):
                self._carry_out(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False

    def _carry_out(self, message: _Command) -> None:
        if isinstance(message, Request):
            self._add(message)
        elif isinstance(message, WithdrawRequest):
            request = self._requests.get(message.request_id)
            if request is not None:
                aborted = RequestAbortedError("the request was withdrawn")
                self._core.fail_request(request, aborted)
        elif isinstance(message, ForgetUser):
            number = self._core.forget_user(message.user_tag)
            self._calls_done.append(CallDone(message.call, number))
        elif isinstance(message, SetTarget):
            share = self._core.set_target(message.emb_fraction)
            self._calls_done.append(CallDone(message.call, share))

    def _add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        try:
            self._core.add_request(request)
        except HelmError as error:
            request.error = error
            self._say([request])

    def _say(self, ended: list[Request]) -> None:
        """Tells the front what ended; nothing, unless a heartbeat is due, when nothing did."""
        now = time.monotonic()
        if not ended and not self._calls_done and now - self._last_said < HEARTBEAT_SECONDS:
            return
        for request in ended:
            del self._requests[request.request_id]
        message = CoreReport(
            stats=EngineStats.of(
                self._core.scheduler, self._traffic, self._core.control, self._num_kv_batches()
            ),
            ended=[EndedRequest.of(request) for request in ended],
            calls_done=self._calls_done,
        )
        self._outbox.send_multipart(self._encoder.encode(message), copy=False)
        self._calls_done = []
        self._last_said = now
