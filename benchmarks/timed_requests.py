"""Engine messages that come at given times to an engine core in this process, and their latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from helm_engine.engine_core import EngineCore
from helm_engine.engine_messages import AddRequest
from helm_engine.exceptions import HelmError
from helm_engine.request import Request
from helm_engine.simulator import open_loop
from helm_engine.simulator.open_loop import Timer
from model_executor.step import Float32Array


@dataclass(slots=True)
class Outcome:
    """What became of timed requests; see `open_loop.Audience`."""

    due_of: dict[str, float]
    """When each is due, in seconds after the start, by request id."""
    keep_scores: bool = False
    latencies_ms: list[float] = field(default_factory=list)
    """From the time each was due to its end, in the order in which they ended."""
    due: list[float] = field(default_factory=list)
    """When each of those was due, in seconds after the start."""
    failures: int = 0
    scores: dict[str, Float32Array] = field(default_factory=dict)
    """By request id."""

    def ended(self, request: Request, now: float) -> None:
        """Counts an ended request."""
        if request.error is not None:
            self.failures += 1
            return
        self.due.append(self.due_of[request.request_id])
        self.latencies_ms.append((now - request.arrival) * 1e3)
        if self.keep_scores and request.scores is not None:
            self.scores[request.request_id] = request.scores

    def refused(self, request: Request, error: HelmError) -> None:
        """Counts a request that the engine did not take."""
        self.failures += 1


def offer(
    core: EngineCore,
    timer: Timer,
    requests: Sequence[tuple[float, AddRequest]],
    events: Sequence[tuple[float, Callable[[], object]]] = (),
    keep_scores: bool = False,
    drain: bool = False,
) -> Outcome:
    """Runs messages open-loop; see `open_loop.offer`.

    Args:
        core: an idle engine.
        timer: the clock that the core reads.
        requests: seconds after the start, ascending, and the request.
        events: seconds after the start, and what to do then; between two steps.
        keep_scores: whether the outcome gets the scores.
        drain: whether moves and refills are waited for too.
    """
    outcome = Outcome({message.request_id: when for when, message in requests}, keep_scores)
    made = ((when, message.request) for when, message in requests)
    open_loop.offer(core, timer, made, outcome, events, drain)
    return outcome
