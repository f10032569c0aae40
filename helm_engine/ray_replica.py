"""One engine as a replica of a Ray Serve deployment.

The engine core is a process beside the replica, as it is beside a front: steps never hold up what
Ray asks of the replica. A replica whose core has ended is replaced by Ray Serve.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace

import ray
from ray import serve

from helm_engine.array_frames import FrameDecoder, FrameEncoder
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig
from helm_engine.engine_client import EngineClient
from helm_engine.engine_host import run_submitted
from helm_engine.engine_messages import RequestError
from helm_engine.engine_stats import EngineStats
from helm_engine.exceptions import EngineUnavailableError, HelmError
from helm_engine.remote_messages import SubmitRequest
from helm_engine.served_model import ServedModel
from router.routed_call import RoutingStats

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """How a replica is."""

    replica: str
    """Its unique id: the engine's name in events and for the router."""
    version: str
    """Of its model."""
    stats: EngineStats


class EngineReplica:
    """Runs one engine core and passes requests on to it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        config: EngineConfig,
        hang_seconds: float,
        start_seconds: float,
        tells_residency: bool,
    ) -> None:
        """Starts the core and waits until it is warm.

        Args:
            config: the engine's.
            hang_seconds: a core that says nothing for so long is killed.
            start_seconds: a core that is not warm by then is given up.
            tells_residency: whether it publishes what it holds, on ports of its own of this node.

        Raises what `EngineClient.ready` raises.
        """
        self._name = serve.get_replica_context().replica_id.unique_id
        if tells_residency:
            # The system chooses the ports; the core says which.
            anywhere = f"tcp://{ray.util.get_node_ip_address()}:*"
            residency = replace(
                config.residency,
                endpoint=anywhere,
                replay_endpoint=anywhere,
                engine_name=self._name,
            )
            config = replace(config, residency=residency)
        self._clock = SystemClock()
        self._encoder = FrameEncoder()
        self._decoder: FrameDecoder[SubmitRequest] = FrameDecoder(SubmitRequest)
        self._core = EngineClient(config, hang_seconds)
        try:
            async with asyncio.timeout(start_seconds):
                self._served = await self._core.ready()
        except TimeoutError:
            await self._core.close()
            raise EngineUnavailableError(
                f"the engine core was not warm after {start_seconds:.0f} s"
            ) from None
        except BaseException:
            await self._core.close()
            raise
        logger.info("engine %s ready: model %s", self._name, self._served.name)

    async def __del__(self) -> None:
        """Ends the core; Ray Serve calls it once the last request has ended."""
        if hasattr(self, "_core"):
            await self._core.close()

    # ---------------------------------------------------------------- for Ray Serve

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises.

        Raises:
            EngineUnavailableError: the core has ended.
        """
        if not self._core.is_alive:
            raise EngineUnavailableError(self._core.ended.result())

    async def record_routing_stats(self) -> RoutingStats:
        """Called by Ray Serve for the routers of this deployment."""
        residency = self._served.config.residency
        return RoutingStats(
            endpoint=residency.endpoint,
            replay_endpoint=residency.replay_endpoint,
            sequence=self._core.stats.kv_event_batches,
        )

    # ---------------------------------------------------------------- for fronts

    async def recommend(self, frames: list[bytes]) -> list[bytes]:
        """Runs a `SubmitRequest` to its end; both it and the `EndedRequest` are frames."""
        message = self._decoder.decode(frames)
        ended = await run_submitted(
            message, self._clock.now(), lambda: (self._core, self._served.version)
        )
        return [bytes(frame) for frame in self._encoder.encode(ended)]

    async def describe(self) -> ServedModel:
        """What is served."""
        return self._served

    async def report(self) -> ReplicaReport:
        """How the replica is."""
        return ReplicaReport(self._name, self._served.version, self._core.stats)

    async def forget_user(self, user_tag: int) -> int | RequestError:
        """Drops a user's KV; returns the number of blocks."""
        try:
            return await self._core.forget_user(user_tag)
        except EngineUnavailableError:
            return 0  # It is gone, and its KV with it.

    async def set_target(self, emb_fraction: float) -> float | RequestError:
        """Asks for another split of the pool; returns the share that will be reached."""
        try:
            return await self._core.set_target(emb_fraction)
        except (HelmError, ValueError) as error:
            return RequestError.of(error if isinstance(error, HelmError) else HelmError(str(error)))
