"""The dispatcher as Ray Serve's request router: which replica of a deployment gets a request.

A replica is an engine. Ray says who is there, and each replica says in its routing stats where it
publishes what it holds and how far it has come; what it holds comes over ZeroMQ. A request knows
its work in the process that routes it, and only its bytes travel.

The API that this is written to (`ray.serve.request_router`, Ray 2.60) is alpha.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypedDict, Unpack

import msgspec
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from router.cost import EngineCosts, Work
from router.dispatcher import Assignment, Dispatcher, NoEngineError, Outcome
from router.event_subscriber import EventSubscriber


class RoutingStats(TypedDict):
    """What a replica's `record_routing_stats` returns."""

    endpoint: str | None
    """ZeroMQ address of its events; None = it publishes nothing."""
    replay_endpoint: str | None
    sequence: int
    """KV event batches that it has published."""


class RouterOptions(msgspec.Struct, frozen=True):
    """What a deployment says to its routers, as JSON values: see `as_kwargs`."""

    policy: str
    """Name in `router.policies.POLICIES`."""
    costs: EngineCosts
    """Of every replica."""
    num_rows: int
    """Of the catalogue."""
    num_positions: int
    """Of the replicas' row digests; 0 = they send none."""
    seed: int | None = None
    """Of the choice among equals; None = another one in each process."""

    def as_kwargs(self) -> dict[str, Any]:
        """The `request_router_kwargs` of a `RequestRouterConfig`."""
        return {"options": msgspec.to_builtins(self)}


class RoutedCall:
    """The argument of a call that is to be routed by its work; a replica gets its frames alone."""

    def __init__(self, work: Work, frames: Sequence[bytes]) -> None:
        """Takes what the call costs, and what the replica is sent."""
        self.work = work
        self.frames = list(frames)
        self.tried: set[str] = set()
        """Replicas that were given it; they get it again only when there are no others."""
        self._assignment: Assignment | None = None
        self._router: DispatcherRouter | None = None

    def __reduce__(self) -> tuple[type[list[bytes]], tuple[list[bytes]]]:
        return list, (self.frames,)

    @property
    def replica(self) -> str | None:
        """Unique id of the replica that it was given to last; None = it was not routed yet."""
        return None if self._assignment is None else self._assignment.engine

    def sent(self, router: DispatcherRouter, assignment: Assignment) -> None:
        """A router has given it to a replica; one that had it before did not take it."""
        self.abandoned()
        self._router, self._assignment = router, assignment
        self.tried.add(assignment.engine)

    def finished(self, **outcome: Unpack[Outcome]) -> None:
        """It was answered; see `Dispatcher.finished` for what may be told."""
        if self._router is not None and self._assignment is not None:
            self._router.finished(self._assignment, **outcome)

    def failed(self) -> None:
        """The replica failed it."""
        if self._router is not None and self._assignment is not None:
            self._router.failed(self._assignment)

    def abandoned(self) -> None:
        """It ended without telling anything of the replica."""
        if self._router is not None and self._assignment is not None:
            self._router.abandoned(self._assignment)


@dataclass(slots=True)
class _Followed:
    """A replica, and who listens to it."""

    subscriber: EventSubscriber | None = None
    stats: dict[str, Any] = field(default_factory=dict)

    def close(self) -> None:
        if self.subscriber is not None:
            self.subscriber.close()


class DispatcherRouter(RequestRouter):
    """Routes calls whose only argument is a `RoutedCall`; others go to any replica."""

    def initialize_state(self, options: dict[str, Any]) -> None:
        """Called by Ray Serve with the deployment's `request_router_kwargs`.

        Raises:
            ValueError: a value is one that no router has.
        """
        self._options = msgspec.convert(options, RouterOptions)
        # Ray's thread routes, and callers say from theirs how it ended.
        self._lock = Lock()
        self._dispatcher = Dispatcher(self._options.policy, self._options.seed)
        self._followed: dict[str, _Followed] = {}

    @property
    def dispatcher(self) -> Dispatcher:
        """What is known of the replicas, by their unique ids."""
        return self._dispatcher

    # ---------------------------------------------------------------- replicas

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray Serve with all replicas whenever one came or went, or has new stats."""
        present = {replica.replica_id.unique_id: replica for replica in replicas}
        for name in [name for name in self._followed if name not in present]:
            self._leave(name)
        for name, replica in present.items():
            if name not in self._followed:
                self._join(name)
            self._follow(name, replica.routing_stats or {})
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Ray Serve when a call shows that a replica is gone."""
        self._leave(replica_id.unique_id)
        super().on_replica_actor_died(replica_id)

    def _join(self, name: str) -> None:
        options = self._options
        with self._lock:
            self._dispatcher.add_engine(
                name,
                options.costs,
                num_rows=options.num_rows,
                num_positions=options.num_positions,
            )
        self._followed[name] = _Followed()

    def _leave(self, name: str) -> None:
        """Forgets a replica and all that it held."""
        followed = self._followed.pop(name, None)
        if followed is None:
            return
        followed.close()
        with self._lock:
            self._dispatcher.remove_engine(name)

    def _follow(self, name: str, stats: dict[str, Any]) -> None:
        """Listens where a replica publishes; asks for everything where batches were missed."""
        followed = self._followed[name]
        endpoint = stats.get("endpoint")
        if endpoint is None:
            return
        if followed.stats.get("endpoint") != endpoint:
            followed.close()
            followed.subscriber = EventSubscriber(
                name, endpoint, stats.get("replay_endpoint"), self._dispatcher.residency
            )
        # Batches of one period ago have had time to come.
        elif (
            followed.subscriber is not None
            and followed.subscriber.num_kv_batches < followed.stats["sequence"]
        ):
            followed.subscriber.resync()
        followed.stats = stats

    # ---------------------------------------------------------------- requests

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Called by Ray Serve for each request, and again where the replica was full."""
        if pending_request is None:
            return [candidate_replicas]
        # Else Ray would ask again and again without a pause.
        pending_request.routing_context.should_backoff = True
        call = pending_request.args[0] if pending_request.args else None
        if not isinstance(call, RoutedCall):
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if call.tried.issuperset(by_name):
            call.tried.clear()
        try:
            with self._lock:
                assignment = self._dispatcher.route(call.work, time.monotonic(), call.tried)
        except NoEngineError:
            return [candidate_replicas]
        call.sent(self, assignment)
        return [[by_name[assignment.engine]]] if assignment.engine in by_name else []

    def finished(self, assignment: Assignment, **outcome: Unpack[Outcome]) -> None:
        """A call was answered; from any thread."""
        with self._lock:
            self._dispatcher.finished(assignment, time.monotonic(), **outcome)

    def failed(self, assignment: Assignment) -> None:
        """A replica failed a call; from any thread."""
        with self._lock:
            self._dispatcher.failed(assignment, time.monotonic())

    def abandoned(self, assignment: Assignment) -> None:
        """A call ended without telling anything of its replica; from any thread."""
        with self._lock:
            self._dispatcher.abandoned(assignment)
