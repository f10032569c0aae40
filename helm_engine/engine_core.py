"""The engine's step loop body: schedule, execute, commit. Knows no device: the executor does."""

from __future__ import annotations

import logging
from typing import Protocol

from helm_engine.clock import Clock
from helm_engine.controller.engine_control import EngineControl
from helm_engine.exceptions import ControllerActiveError, HelmError, StepFailedError
from helm_engine.request import Request
from helm_engine.scheduler import Scheduler
from model_executor.exceptions import RowsUnavailableError
from model_executor.executor import Executor

logger = logging.getLogger(__name__)


class ResidencyReporter(Protocol):
    """Tells routers what the engine holds; see `ResidencyPublisher`."""

    def report(self) -> None:
        """Takes what came and went since the last call; between steps."""
        ...


class EngineCore:
    """Owns one scheduler and one executor; single-threaded."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        control: EngineControl | None = None,
        residency: ResidencyReporter | None = None,
    ) -> None:
        """Takes what plans and what carries out steps; what moves the boundary and who listens."""
        self.scheduler = scheduler
        self.control = control
        self._executor = executor
        self._clock = clock
        self._residency = residency
        self.made_progress = False
        """Whether the last step did anything, for requests or for the pool."""
        self.failed_in_a_row = 0
        """Steps that could not be carried out since the last one that could; those that lacked
        rows do not count, for another process would not have the rows either."""

    def add_request(self, request: Request) -> None:
        """Queues a request; see `Scheduler.add_request`."""
        if self.control is not None:
            self.control.observe_arrival(request)
        self.scheduler.add_request(request)

    def fail_request(self, request: Request, error: HelmError) -> None:
        """Ends an unfinished request with an error, and frees what it held."""
        self.scheduler.fail(request, error)

    def forget_user(self, user_tag: int) -> int:
        """Makes a user's KV unreachable; see `Scheduler.forget_user`."""
        return self.scheduler.forget_user(user_tag)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return self.scheduler.has_work

    @property
    def has_background_work(self) -> bool:
        """Whether `step` would do anything for the pool, also without requests."""
        return self.scheduler.has_background_work(self._clock.now())

    def set_target(self, emb_fraction: float) -> float:
        """Asks for another split of the pool; see `Boundary.set_target`.

        Raises:
            ControllerActiveError: a controller decides on the split.
            ValueError: not within 0..1.
        """
        if self.control is not None:
            raise ControllerActiveError()
        return self.scheduler.boundary.set_target(emb_fraction)

    def run_until_idle(self) -> list[Request]:
        """Steps until nothing is left; returns the requests in the order they ended."""
        ended: list[Request] = []
        while self.has_work:
            ended += self.step()
        return ended

    def check_nothing_leaked(self) -> None:
        """Checks an idle engine; see `Scheduler.check_nothing_leaked`."""
        self.scheduler.check_nothing_leaked()

    def check_integrity(self) -> None:
        """Checks the pool's books; see `Scheduler.check_integrity`."""
        self.scheduler.check_integrity()

    def step(self) -> list[Request]:
        """Runs one step; returns the requests that ended, with results or with an error."""
        self.control_boundary()
        pages_moved = self.scheduler.boundary.num_moved_pages
        step = self.scheduler.schedule(self._clock.now())
        self.made_progress = (
            step is not None or self.scheduler.boundary.num_moved_pages != pages_moved
        )
        finished: list[Request] = []
        if step is not None:
            try:
                output = self._executor.execute(step)
            except RowsUnavailableError as error:
                # The host tier says so in the log itself, once for each outage.
                failure = StepFailedError(f"the step failed: {error}")
                self.scheduler.fail_step(step, failure, moves_made=True)
            except Exception as error:
                # A step may fail for reasons outside the engine (a device out of memory,
                # a bug): its requests are told, the engine goes on.
                logger.exception("a step of %d requests failed", len(step.requests))
                self.scheduler.fail_step(step, StepFailedError(f"the step failed: {error}"))
                self.failed_in_a_row += 1
            else:
                self.failed_in_a_row = 0
                finished = self.scheduler.update(step, output, self._clock.now())
        ended = finished + self.scheduler.take_failed()
        if self.control is not None:
            self.control.observe_ended(ended, self._clock.now())
        self.report_residency()
        return ended

    def control_boundary(self) -> None:
        """Lets the controller decide; `step` does so too, so this is for an engine at rest."""
        if self.control is not None:
            self.control.act(self._clock.now())

    def report_residency(self) -> None:
        """Tells routers what came and went; `step` does so too, so this is for one at rest."""
        if self._residency is not None:
            self._residency.report()
