"""What a deployment, its callers and its routers share: options, stats, and calls with their work.

Nothing here knows Ray: it copies the module of a request router from process to process, and what
the copies share must stand elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict, Unpack

import msgspec

from router.cost import EngineCosts, Work
from router.dispatcher import Assignment, Outcome
from router.event_subscriber import EventSubscriber, ResidencySink


class CallRouter(Protocol):
    """What a call needs of the router that routed it; from any thread."""

    def finished(self, assignment: Assignment, **outcome: Unpack[Outcome]) -> None:
        """It was answered."""
        ...

    def failed(self, assignment: Assignment) -> None:
        """The replica failed it."""
        ...

    def abandoned(self, assignment: Assignment) -> None:
        """It ended without telling anything of the replica."""
        ...


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
        kwargs: dict[str, Any] = msgspec.to_builtins(self)
        return kwargs


class RoutedCall:
    """The argument of a call that is to be routed by its work; a replica gets its frames alone."""

    def __init__(self, work: Work, frames: Sequence[bytes]) -> None:
        """Takes what the call costs, and what the replica is sent."""
        self.work = work
        self.frames = list(frames)
        self.tried: set[str] = set()
        """Replicas that were given it; they get it again only when there are no others."""
        self._assignment: Assignment | None = None
        self._router: CallRouter | None = None

    def __reduce__(self) -> tuple[type[list[bytes]], tuple[list[bytes]]]:
        return list, (self.frames,)

    @property
    def replica(self) -> str | None:
        """Unique id of the replica that it was given to last; None = it was not routed yet."""
        return None if self._assignment is None else self._assignment.engine

    def sent(self, router: CallRouter, assignment: Assignment) -> None:
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


class FollowedReplica:
    """A replica whose events are read, once it says where it publishes them."""

    def __init__(self, name: str, sink: ResidencySink) -> None:
        """Takes the replica's name and who is told what it holds."""
        self._name = name
        self._sink = sink
        self._stats: RoutingStats | None = None
        self._subscriber: EventSubscriber | None = None

    def follow(self, stats: RoutingStats) -> None:
        """Takes its latest stats: reads its events, and asks for all where batches were missed."""
        if stats["endpoint"] is None:
            return
        if self._stats is None or self._subscriber is None:
            self._subscriber = EventSubscriber(
                self._name, stats["endpoint"], stats["replay_endpoint"], self._sink
            )
        # Batches that were published one period ago have had time to come.
        elif self._subscriber.num_kv_batches < self._stats["sequence"]:
            self._subscriber.resync()
        self._stats = stats

    def close(self) -> None:
        """Reads them no more."""
        if self._subscriber is not None:
            self._subscriber.close()
