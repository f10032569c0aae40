"""The dispatcher as Ray Serve's request router: which replica of a deployment gets a request.

A replica is an engine. Ray says who is there, and each replica says in its routing stats where it
publishes what it holds and how far it has come; what it holds comes over ZeroMQ. A request knows
its work in the process that routes it, and only its bytes travel.

The API that this is written to (`ray.serve.request_router`, Ray 2.60) is alpha. Ray copies this
module by value into each process that routes, so it holds the router alone.
"""

from __future__ import annotations

import time
from threading import Lock
from typing import Any, Unpack

import msgspec
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from router.dispatcher import Assignment, Dispatcher, NoEngineError, Outcome
from router.routed_call import FollowedReplica, RoutedCall, RouterOptions, RoutingStats


class DispatcherRouter(RequestRouter):
    """Routes calls whose only argument is a `RoutedCall`; others go to any replica."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray Serve with `RouterOptions.as_kwargs` of the deployment.

        Raises:
            ValueError: a value is one that no router has.
        """
        self._options = msgspec.convert(kwargs, RouterOptions)
        # Ray's thread routes, and callers say from theirs how it ended.
        self._lock = Lock()
        self._dispatcher = Dispatcher(self._options.policy, self._options.seed)
        self._followed: dict[str, FollowedReplica] = {}

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
            if replica.routing_stats:
                self._followed[name].follow(msgspec.convert(replica.routing_stats, RoutingStats))
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
        self._followed[name] = FollowedReplica(name, self._dispatcher.residency)

    def _leave(self, name: str) -> None:
        """Forgets a replica and all that it held."""
        followed = self._followed.pop(name, None)
        if followed is None:
            return
        followed.close()
        with self._lock:
            self._dispatcher.remove_engine(name)

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
