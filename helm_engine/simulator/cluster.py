"""Many engines behind routers in virtual time: the engines' own code, and the router's own code.

Each engine is a `SimulatedEngine` with a clock, a pool, a scheduler and perhaps a controller of its
own. What happens in the cluster happens in the order of time: a request is routed with what its
router knows then, and an engine in the middle of a step takes it when the step ends. Routers learn
of engines only through what these publish, `staleness_s` after it happened, and through the answers
to requests that they sent themselves; of one another they learn nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import NamedTuple

import numpy as np

from helm_engine.exceptions import HelmError
from helm_engine.request import Request
from helm_engine.simulator.cluster_result import ClusterResult
from helm_engine.simulator.engine_events import Batches, EngineEvents
from helm_engine.simulator.open_loop import OpenLoop, VirtualTimer
from helm_engine.simulator.scaling import CoarseHistory
from helm_engine.simulator.simulation import (
    EngineModel,
    Ledger,
    Result,
    SimulatedEngine,
    Split,
)
from helm_engine.simulator.trace import Trace
from router.cost import EngineCosts, Work
from router.dispatcher import Assignment, Dispatcher
from router.policies import policy_named

_DELIVERY, _ENGINE = 0, 2
"""What happens first of what happens at the same time: what was told, then requests that come (1),
then what engines do."""
_REQUEST = 1


@dataclass(frozen=True, slots=True)
class ClusterModel:
    """The engines and routers that a trace is run through."""

    engine: EngineModel
    """Of each engine: they are alike."""
    emb_fractions: tuple[float, ...]
    """EMB share of the pages at the start, 0..1, of each engine; floors apply."""
    policy: str = "joint"
    """By which routers choose, by name."""
    routers: int = 1
    """Requests are dealt to them at random."""
    staleness_s: float = 0.1
    """So long after an engine has published something routers know it."""
    seed: int = 0
    """Of who routes which request, and of ties."""
    names: tuple[str, ...] = ()
    """Of the engines; empty = they are numbered."""

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: names the field.
        """
        engines = len(self.emb_fractions)
        if engines < 1:
            raise ValueError("engines: must be at least 1, not 0")
        if self.routers < 1:
            raise ValueError(f"routers: must be at least 1, not {self.routers}")
        if not 0.0 <= self.staleness_s < inf:
            raise ValueError(f"staleness_s: must be at least 0 and finite, not {self.staleness_s}")
        if self.names and len(set(self.names)) != engines:
            raise ValueError(f"names: must be {engines} different ones")

    @property
    def engine_names(self) -> tuple[str, ...]:
        """Of each engine."""
        width = len(str(len(self.emb_fractions) - 1))
        return self.names or tuple(
            f"engine-{place:0{width}}" for place in range(len(self.emb_fractions))
        )


def spread_fractions(engines: int, middle: float, width: float) -> tuple[float, ...]:
    """EMB shares of so many engines, evenly from `width` / 2 below the middle to as much above.

    Raises:
        ValueError: one is not within 0..1.
    """
    low, high = middle - width / 2.0, middle + width / 2.0
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"emb_fraction: {low:g} to {high:g} is not within 0..1")
    places = np.linspace(low, high, engines) if engines > 1 else np.array([middle])
    return tuple(places.tolist())


def engine_costs(model: EngineModel) -> EngineCosts:
    """What work costs on an engine, as routers are told."""
    profile = model.coarse_profile
    return EngineCosts(**{one.name: getattr(profile, one.name) for one in fields(EngineCosts)})


def work_of(request: Request, block_tokens: int) -> Work:
    """A request as routers see it.

    Args:
        request: of a trace.
        block_tokens: of a block that is not coarse.
    """
    hashes = request.block_hashes
    if isinstance(hashes, CoarseHistory) and len(hashes):
        # All coarse blocks together are worth all full ones; see `CoarseKV`.
        block_tokens = hashes.num_full * block_tokens // len(hashes)
    tokens = request.tokens
    return Work(
        block_hashes=hashes,
        block_tokens=block_tokens,
        num_tokens=request.num_tokens,
        rows=tokens.rows,
        candidate_rows=tokens.candidate_rows,
        user_tag=request.user_tag,
    )


@dataclass(slots=True)
class _Seat:
    """An engine in the cluster."""

    place: int
    name: str
    engine: SimulatedEngine
    events: EngineEvents
    loop: OpenLoop
    unfinished: list[dict[str, float]]
    """Of each router, the predicted milliseconds of its requests that have not ended."""
    planned: float = inf
    """When it is expected to do something next; older plans of it are void."""


class _Sent(NamedTuple):
    """A request on its way."""

    router: int
    seat: _Seat
    assignment: Assignment


class Cluster:
    """Engines and routers, and the order in which things happen to them."""

    def __init__(self, trace: Trace, model: ClusterModel) -> None:
        """Builds idle engines, and routers that know their names and prices.

        Raises:
            PoolTooSmallError: a pool cannot hold what one request may need.
            ValueError: a share is not within 0..1, a name is unknown, or the trace was drawn for
                another scale.
        """
        scale = model.engine.scale
        if trace.scale != scale:
            raise ValueError(
                f"scale: the trace was drawn for {trace.scale}, the engines are at {scale}"
            )
        self.trace = trace
        self.model = model
        self.ledger = Ledger(len(trace))
        self.routers = [
            Dispatcher(model.policy, seed=model.seed * model.routers + number)
            for number in range(model.routers)
        ]
        self.seats = [
            self._seat(place, name, share)
            for place, (name, share) in enumerate(
                zip(model.engine_names, model.emb_fractions, strict=True)
            )
        ]
        self._seat_of = {one.name: one for one in self.seats}
        dealt = np.random.default_rng([model.seed, trace.seed])
        self.router_of = dealt.integers(model.routers, size=len(trace))
        self.engine_of = np.full(len(trace), -1, dtype=np.int64)
        self.predicted_ms = np.full(len(trace), np.nan)
        self._sent: dict[str, _Sent] = {}
        self._queue: list[tuple[float, int, int, Callable[[], None]]] = []
        self._order = count()

    def _seat(self, place: int, name: str, share: float) -> _Seat:
        model = self.model
        engine = SimulatedEngine(model.engine, share)
        policy = policy_named(model.policy)
        events = EngineEvents(engine.scheduler, policy.knows_kv, policy.knows_rows)
        for router in self.routers:
            router.add_engine(
                name,
                engine_costs(model.engine),
                num_rows=engine.scheduler.emb.num_rows,
                num_positions=events.num_positions,
            )
        loop = OpenLoop(engine.core, VirtualTimer(engine.clock), self)
        return _Seat(place, name, engine, events, loop, [{} for _ in self.routers])

    # ---------------------------------------------------------------- what happens, in order

    def run(self, schedule: Sequence[Split] = ()) -> ClusterResult:
        """Runs all requests of the trace open-loop, the warm-up included; once.

        Args:
            schedule: when the boundaries of all engines are asked to go where from then on.

        Raises:
            ValueError: a share is not within 0..1.
        """
        moves = sorted(schedule, reverse=True)
        for place, when in enumerate(self.trace.arrivals.tolist()):
            while moves and moves[-1][0] <= when:
                self.move_boundaries(*moves.pop())
            self.request(place, when)
        for move in reversed(moves):
            self.move_boundaries(*move)
        self.finish()
        return self._result()

    def request(self, place: int, when: float) -> None:
        """A request of the trace comes; nothing that comes from outside is earlier any more."""
        self._pass_time(when)
        request = self.trace.request(place)
        router = int(self.router_of[place])
        work = work_of(request, self.trace.setting.block_tokens)
        assignment = self.routers[router].route(work, when)
        seat = self._seat_of[assignment.engine]
        self.engine_of[place] = seat.place
        self.predicted_ms[place] = assignment.predicted_ms
        self._sent[request.request_id] = _Sent(router, seat, assignment)
        seat.unfinished[router][request.request_id] = assignment.charged_ms
        seat.loop.come_to(when)
        seat.loop.add(request, when)
        self._plan(seat)

    def move_boundaries(self, when: float, emb_fraction: float) -> None:
        """Asks all engines for another split."""
        self._pass_time(when)
        for seat in self.seats:
            seat.loop.come_to(when)
            seat.engine.core.set_target(emb_fraction)
            self._plan(seat)

    def finish(self) -> None:
        """Everything until all requests have ended and all that was published has arrived."""
        while self._sent:
            heappop(self._queue)[-1]()
        for seat in self.seats:
            seat.planned = inf
            seat.loop.finish()
            self._publish(seat)
            seat.engine.core.check_nothing_leaked()
        self._pass_time(inf)

    def _pass_time(self, when: float) -> None:
        """Everything that happens before something comes from outside."""
        queue = self._queue
        while queue and queue[0][:2] < (when, _REQUEST):
            heappop(queue)[-1]()

    def _plan(self, seat: _Seat) -> None:
        """Takes note of when an engine goes on."""
        when = seat.loop.next_at
        if when == seat.planned:
            return
        seat.planned = when
        if when < inf:
            self._at(when, _ENGINE, partial(self._proceed, seat, when))

    def _at(self, when: float, kind: int, act: Callable[[], None]) -> None:
        heappush(self._queue, (when, kind, next(self._order), act))

    def _proceed(self, seat: _Seat, planned: float) -> None:
        if planned != seat.planned:
            return
        seat.planned = inf
        seat.loop.proceed()
        self._publish(seat)
        self._plan(seat)

    # ---------------------------------------------------------------- what is told

    def _publish(self, seat: _Seat) -> None:
        """What an engine holds now, and has to do, is on its way to all routers."""
        now = seat.engine.clock.now()
        batches = seat.events.take(now)
        routed_ms = [sum(one.values()) for one in seat.unfinished]
        is_shared = len(routed_ms) > 1
        if batches.kv is not None or batches.rows is not None or is_shared:
            when = now + self.model.staleness_s
            self._at(when, _DELIVERY, partial(self._tell, seat, batches, routed_ms))

    def _tell(self, seat: _Seat, batches: Batches, routed_ms: list[float]) -> None:
        for number, router in enumerate(self.routers):
            if batches.kv is not None:
                router.residency.apply_kv(seat.name, batches.kv)
            if batches.rows is not None:
                router.residency.apply_rows(seat.name, batches.rows)
            others_ms = sum(routed_ms[:number]) + sum(routed_ms[number + 1 :])
            router.registry.set_others_ms(seat.name, others_ms)

    def ended(self, request: Request, now: float) -> None:
        """See `open_loop.Audience`."""
        self.ledger.ended(request, now)
        sent = self._leave(request)
        self._at(now, _DELIVERY, partial(self._answer, sent, request, now))

    def refused(self, request: Request, error: HelmError) -> None:
        """See `open_loop.Audience`: its latency stays NaN, and its router hears at once."""
        sent = self._leave(request)
        self.routers[sent.router].abandoned(sent.assignment)

    def _leave(self, request: Request) -> _Sent:
        """An engine has nothing to do with a request any more."""
        sent = self._sent.pop(request.request_id)
        del sent.seat.unfinished[sent.router][request.request_id]
        return sent

    def _answer(self, sent: _Sent, request: Request, now: float) -> None:
        router = self.routers[sent.router]
        if request.error is not None:
            router.abandoned(sent.assignment)
            return
        router.finished(
            sent.assignment,
            now,
            service_ms=sent.seat.engine.log.service_ms[request.request_id],
            cached_tokens=request.cached_tokens,
            rows_requested=request.rows_requested,
            rows_resident=request.rows_resident,
        )

    def _result(self) -> ClusterResult:
        trace, ledger, scale = self.trace, self.ledger, self.trace.scale
        logs = [one.engine.log for one in self.seats]
        steps_of = [one.columns() for one in logs]
        schedulers = [one.engine.scheduler for one in self.seats]
        service_ms = [
            logs[engine].service_ms[str(place)]
            for place, engine in enumerate(self.engine_of.tolist())
        ]
        return ClusterResult(
            result=Result(
                trace=trace,
                latencies_ms=ledger.latencies_ms,
                cached_tokens=ledger.cached,
                rows_requested=ledger.requested * scale,
                rows_resident=ledger.resident * scale,
                service_ms=np.array(service_ms),
                steps={
                    name: np.concatenate([steps[name] for steps in steps_of])
                    for name in steps_of[0]
                },
                num_pages=schedulers[0].pool.num_pages * scale,
                num_moved_pages=sum(one.boundary.num_moved_pages for one in schedulers) * scale,
            ),
            names=self.model.engine_names,
            engine_of=self.engine_of,
            router_of=self.router_of,
            predicted_ms=self.predicted_ms,
            steps_of=steps_of,
        )


def simulate_cluster(
    trace: Trace, model: ClusterModel, schedule: Sequence[Split] = ()
) -> ClusterResult:
    """Runs all requests of a trace open-loop over many engines, the warm-up included.

    Args:
        trace: of all engines together; it is not changed.
        model: engines of the trace's setting and scale, and who routes.
        schedule: when the boundaries of all engines are asked to go where from then on.

    Raises:
        PoolTooSmallError: a pool cannot hold what one request may need.
        ValueError: a share is not within 0..1, the policy is unknown, or the trace was drawn for
            another scale.
    """
    return Cluster(trace, model).run(schedule)
