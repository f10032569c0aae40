"""A real engine's steps once more in virtual time: the same calls at the same moments.

What an engine decides follows from what it is asked, in which order and when, and from which
refills were done by then. All of this is recorded while it runs on a device; replayed without one,
every request must meet the same hits. Whatever differs is a mistake of the simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from block_manager.row_plan import RefillPlan
from helm_engine.clock import Clock
from helm_engine.engine_core import EngineCore
from helm_engine.request import Request
from helm_engine.scheduler import Scheduler
from model_executor.executor import Executor
from model_executor.simulated_executor import nothing_computed
from model_executor.step import ModelOutput, SchedulerOutput, StepTimings


@dataclass(frozen=True, slots=True)
class Added:
    """A request was taken."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Moved:
    """Another split was asked for."""

    emb_fraction: float


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step was made."""

    times: tuple[float, ...]
    """What the engine's clock said, each time that the step looked at it, seconds."""
    timings: StepTimings | None = None
    """None where there was nothing to carry out, or it failed."""
    failed: bool = False
    refilled: bool = False
    """Whether a refill's rows were found in their slots."""
    refill_failed: bool = False


Call = Added | Moved | Stepped


class _Watched:
    """A clock that remembers what it said."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.said: list[float] = []

    def now(self) -> float:
        self.said.append(self._clock.now())
        return self.said[-1]


class RecordingCore(EngineCore):
    """An engine core that writes down what it is called for."""

    def __init__(self, scheduler: Scheduler, executor: Executor, clock: Clock) -> None:
        """As `EngineCore`."""
        self._inner = executor
        self._watched = _Watched(clock)
        super().__init__(scheduler, self, self._watched)
        self.calls: list[Call] = []
        """In their order."""
        self._latest = Stepped(())

    def add_request(self, request: Request) -> None:
        """See `EngineCore.add_request`."""
        super().add_request(request)  # A refusal changes nothing.
        self.calls.append(Added(request.request_id))

    def set_target(self, emb_fraction: float) -> float:
        """See `EngineCore.set_target`."""
        self.calls.append(Moved(emb_fraction))
        return super().set_target(emb_fraction)

    def step(self) -> list[Request]:
        """See `EngineCore.step`."""
        self._watched.said, self._latest = [], Stepped(())
        ended = super().step()
        self.calls.append(replace(self._latest, times=tuple(self._watched.said)))
        return ended

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """See `Executor.execute`."""
        self._latest = Stepped((), failed=True)
        output = self._inner.execute(step)
        self._latest = Stepped(
            (),
            output.timings_ms,
            refilled=output.refilled is not None,
            refill_failed=output.refill_failed is not None,
        )
        return output


class _Recorded:
    """Clock and executor of a replay: both say what was recorded."""

    def __init__(self) -> None:
        self.step = Stepped(())
        self._said = 0
        self._refill: RefillPlan | None = None

    def begin(self, step: Stepped) -> None:
        self.step, self._said = step, 0

    def now(self) -> float:
        self._said += 1
        return self.step.times[self._said - 1]

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        recorded = self.step
        if recorded.failed or recorded.timings is None:
            raise RuntimeError("the step failed when it was recorded")
        refilled = self._refill if recorded.refilled else None
        failed = self._refill if recorded.refill_failed else None
        if recorded.refilled or recorded.refill_failed:
            self._refill = None
        if step.refill is not None:
            self._refill = step.refill
        return nothing_computed(step, recorded.timings, refilled, failed)


def replay(
    calls: Sequence[Call], scheduler: Scheduler, make_request: Callable[[str], Request]
) -> list[Request]:
    """Makes recorded calls once more; returns the requests in the order in which they ended.

    Args:
        calls: from `RecordingCore.calls`.
        scheduler: as the recorded one was before the first call.
        make_request: the request of an id as it was then, its arrival included.

    Raises:
        HelmError: a request is refused; it was not recorded, or the scheduler was another.
    """
    recorded = _Recorded()
    core = EngineCore(scheduler, recorded, recorded)
    ended: list[Request] = []
    for call in calls:
        if isinstance(call, Added):
            core.add_request(make_request(call.request_id))
        elif isinstance(call, Moved):
            core.set_target(call.emb_fraction)
        else:
            recorded.begin(call)
            ended += core.step()
    return ended
