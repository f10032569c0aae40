"""Ray Serve's request router over stubs of replicas; as in Ray's processes, copied by value."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from router.cost import Work
from router.routed_call import RoutedCall, RouterOptions
from tests.router.deviceless_engine import (
    BLOCK_TOKENS,
    NUM_POSITIONS,
    NUM_ROWS,
    DevicelessEngine,
    hashes_of,
    history,
)
from tests.router.fleet import COSTS, work_of

pytest.importorskip("ray", reason="the extra ray is not installed")

from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

DEPLOYMENT = DeploymentID(name="engine", app_name="helm-engine")
OPTIONS = RouterOptions("joint", COSTS, NUM_ROWS, NUM_POSITIONS, seed=0)
WAIT_SECONDS = 20.0
LENGTH = 20


@dataclass(eq=False)
class Replica:
    """What a router asks of a replica."""

    name: str
    routing_stats: dict[str, Any] = field(default_factory=dict)
    max_ongoing_requests: int = 10

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(self.name, DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


def make_router(options: RouterOptions = OPTIONS) -> Any:
    """As `serve` makes it, from the class that it sends to each process that routes."""
    config = RequestRouterConfig(
        **{"request_router_class": "router.ray_serve:DispatcherRouter"}  # type: ignore[arg-type]
    )
    router = config.get_request_router_class()(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    router.initialize_state(**options.as_kwargs())
    return router


def request(*arguments: object) -> PendingRequest:
    metadata = RequestMetadata(request_id="r", internal_request_id="i")
    return PendingRequest(args=list(arguments), kwargs={}, metadata=metadata)


async def chosen(router: Any, replicas: list[Replica], pending: PendingRequest) -> list[str]:
    ranks = await router.choose_replicas(replicas, pending)
    return [replica.name for rank in ranks for replica in rank]


def call(work: Work | None = None) -> RoutedCall:
    return RoutedCall(work_of(0) if work is None else work, [b"frames"])


def work_of_user(user: int) -> Work:
    """A request of a user of deviceless engines."""
    tokens = history(user, LENGTH)
    rows = tokens.rows[tokens.rows >= 0]
    return Work(hashes_of(user, LENGTH), BLOCK_TOKENS, LENGTH, rows, rows[:0])


async def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.01)


def test_only_the_bytes_of_a_call_travel() -> None:
    make, arguments = call().__reduce__()
    assert make(*arguments) == [b"frames"]


def test_a_call_goes_where_its_history_was_published() -> None:
    async def run() -> None:
        with DevicelessEngine() as engine:
            engine.books.visit(3, LENGTH)
            engine.report()
            endpoint, replay = engine.addresses
            stats = {"endpoint": endpoint, "replay_endpoint": replay, "sequence": 1}
            replicas = [Replica(name) for name in "abcd"]
            replicas[2] = Replica("c", stats)
            router = make_router()
            router.update_replicas(replicas)
            residency = router.dispatcher.residency

            def is_known() -> bool:
                engine.report()
                return bool(residency.num_blocks("c"))

            await until(is_known)
            for _ in range(8):
                sent = call(work_of_user(3))
                assert await chosen(router, replicas, request(sent)) == ["c"]
                sent.finished(service_ms=1.0)
            # Gone, and another one has come: nothing of it is left.
            router.update_replicas([*replicas[:2], replicas[3], Replica("e")])
            with pytest.raises(KeyError):
                residency.num_blocks("c")
            # It is known again by another name only.
            router.update_replicas([Replica("c", stats)])
            await until(is_known)
            router.on_replica_actor_died(ReplicaID("c", DEPLOYMENT))
            with pytest.raises(KeyError):
                residency.num_blocks("c")

    asyncio.run(run())


def test_a_full_replica_gives_its_charge_back() -> None:
    async def run() -> None:
        replicas = [Replica("a"), Replica("b")]
        router = make_router()
        router.update_replicas(replicas)
        pending = request(sent := call())
        (first,) = await chosen(router, replicas, pending)
        (second,) = await chosen(router, replicas, pending)
        assert {first, second} == {"a", "b"}
        outstanding = router.dispatcher.registry.num_outstanding
        assert (outstanding(first), outstanding(second)) == (0, 1)
        assert sent.replica == second
        sent.finished(service_ms=1.0)
        assert outstanding(second) == 0
        # Neither had room: both may have it by now.
        assert await chosen(router, replicas, pending) in (["a"], ["b"])
        # A pause follows, or Ray would ask without one.
        assert pending.routing_context.should_backoff

    asyncio.run(run())


def test_other_calls_may_go_anywhere() -> None:
    async def run() -> None:
        replicas = [Replica("a"), Replica("b")]
        router = make_router()
        router.update_replicas(replicas)
        assert await chosen(router, replicas, request()) == ["a", "b"]
        assert await chosen(router, replicas, request("text")) == ["a", "b"]

    asyncio.run(run())


def test_the_same_seed_deals_alike_whatever_replicas_are_called() -> None:
    async def dealt(names: str) -> list[int]:
        replicas = [Replica(name) for name in names]
        router = make_router(RouterOptions("joint", COSTS, NUM_ROWS, NUM_POSITIONS, seed=7))
        router.update_replicas(replicas)
        dealt = []
        for user in range(40):
            (name,) = await chosen(router, replicas, request(call(work_of(user))))
            dealt.append(names.index(name))
        return dealt

    assert asyncio.run(dealt("abc")) == asyncio.run(dealt("xyz"))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="policy"):
        make_router(RouterOptions("nonsense", COSTS, NUM_ROWS, NUM_POSITIONS))
