"""What a front and an engine on another host say to each other; never pickled, all types checked.

Clocks of two hosts have nothing in common, so times are told as seconds since or until now.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import msgspec

from block_manager.pool_layout import PoolConfig, PoolLayout
from helm_engine.config import (
    EngineConfig,
    ExecutorConfig,
    HostTierConfig,
    RequestLimits,
    ResidencyConfig,
    SchedulerConfig,
)
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.engine_messages import (
    AddRequest,
    CallDone,
    EndedRequest,
    ForgetUser,
    RequestError,
    SetTarget,
    WithdrawRequest,
)
from helm_engine.engine_stats import EngineStats
from helm_engine.request import Request
from helm_engine.served_model import ServedModel
from model_executor.capabilities import Capabilities
from model_executor.cost_profile import CostProfile
from model_executor.device_memory import DeviceMemory
from model_executor.model_config import parse_model_config

PROTOCOL = 1
"""Both sides must speak the same."""

BEAT_SECONDS = 0.1
"""Each side says something at least this often."""


class FrontBeat(msgspec.Struct, tag="front", frozen=True):
    """A front is there, and this is the engine that it knows of; it is told where that is wrong."""

    protocol: int
    host: str | None
    life: int | None


class SubmitRequest(msgspec.Struct, tag="submit", frozen=True):
    """A request to run."""

    request: AddRequest
    """Its times are of no meaning to the engine."""
    version: str
    """Of the model that it was prepared for."""
    age: float
    """Seconds since it came."""
    time_left: float | None
    """Seconds until its deadline; None = it has none."""

    @classmethod
    def of(cls, request: Request, version: str, now: float) -> SubmitRequest:
        """What is sent of a request at a time of the front's clock."""
        left = None if request.deadline == inf else request.deadline - now
        return cls(AddRequest.of(request), version, now - request.arrival, left)

    def received(self, now: float) -> Request:
        """The request, with the times of the engine's clock."""
        request = self.request.request()
        request.arrival = now - self.age
        request.deadline = inf if self.time_left is None else now + self.time_left
        return request


class ReloadModel(msgspec.Struct, tag="reload", frozen=True):
    """Put a model in the place of the one served."""

    call: int
    """Number that the answer repeats."""
    model_dir: str | None
    """On the engine's host; None = the one served, again."""


class FrontLeaves(msgspec.Struct, tag="leave", frozen=True):
    """A front stops, and waits for nothing any more."""


ToHost = (
    FrontBeat | SubmitRequest | WithdrawRequest | ForgetUser | SetTarget | ReloadModel | FrontLeaves
)


class ServedMessage(msgspec.Struct, frozen=True):
    """A `ServedModel`, without what is the engine's own business: paths and passwords."""

    name: str
    version: str
    model_config: dict[str, Any]
    """As in `config.json`."""
    capabilities: Capabilities
    layout: PoolLayout
    memory: DeviceMemory
    activation_bound: int
    can_retrieve: bool
    cost_profile: CostProfile | None
    pool: PoolConfig
    scheduler: SchedulerConfig
    executor: ExecutorConfig
    host_tier: HostTierConfig
    limits: RequestLimits
    controller: ControllerConfig
    residency: ResidencyConfig
    """Its addresses as seen from the engine's host."""
    workspace: int | None = None

    @classmethod
    def of(cls, served: ServedModel) -> ServedMessage:
        """What fronts are told."""
        config = served.config
        redis = config.host_tier.redis_address
        source = "mmap" if redis is None else f"redis://{redis}"
        return cls(
            name=served.name,
            version=served.version,
            model_config=served.model_config.model_dump(mode="json"),
            capabilities=served.capabilities,
            layout=served.layout,
            memory=served.memory,
            activation_bound=served.activation_bound,
            can_retrieve=served.can_retrieve,
            cost_profile=served.cost_profile,
            pool=config.pool,
            scheduler=config.scheduler,
            executor=config.executor,
            host_tier=replace(config.host_tier, source=source),
            limits=config.limits,
            controller=replace(config.controller, name=None, decision_log=None),
            residency=config.residency,
            workspace=served.workspace,
        )

    def served(self, host: str) -> ServedModel:
        """What a front knows of the engine.

        Args:
            host: where the front reaches the engine.

        Raises:
            ValueError: a value is one that no engine has.
        """
        residency = replace(
            self.residency,
            endpoint=_reachable(self.residency.endpoint, host),
            replay_endpoint=_reachable(self.residency.replay_endpoint, host),
        )
        config = EngineConfig(
            Path(self.name),
            self.pool,
            self.scheduler,
            self.executor,
            self.host_tier,
            self.limits,
            self.controller,
            residency,
            served_model_name=self.name,
        )
        return ServedModel(
            config=config,
            model_config=parse_model_config(self.model_config, self.name),
            version=self.version,
            capabilities=self.capabilities,
            layout=self.layout,
            memory=self.memory,
            activation_bound=self.activation_bound,
            can_retrieve=self.can_retrieve,
            cost_profile=self.cost_profile,
            workspace=self.workspace,
        )


def _reachable(endpoint: str | None, host: str) -> str | None:
    """An address that an engine has bound, as its fronts reach it; None where they cannot."""
    if endpoint is None or not endpoint.startswith("tcp://"):
        return None
    bound, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return f"tcp://{host}:{port}" if bound in ("*", "0.0.0.0", "[::]") else endpoint


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """An engine is ready; also sent when another one has taken its place."""

    host: str
    """Of the process that speaks; another one knows nothing of earlier requests."""
    life: int
    """Of the engine: the next one has another number and holds nothing yet."""
    model: ServedMessage


class CallFailed(msgspec.Struct, frozen=True):
    """A call that could not be carried out."""

    call: int
    error: RequestError


class HostReport(msgspec.Struct, tag="report", frozen=True):
    """What happened, and how the engine is."""

    host: str
    life: int | None
    """Of the engine that takes requests; None = there is none."""
    why_none: str
    silence: float
    """Seconds since the engine's process last showed that it runs."""
    is_leaving: bool
    """The host is about to stop: it finishes what it has."""
    stats: EngineStats
    ended: list[EndedRequest] = []
    """Their times are seconds since the request came."""
    calls_done: list[CallDone] = []
    calls_failed: list[CallFailed] = []


class Refusal(msgspec.Struct, tag="refusal", frozen=True):
    """The host will not work with this front."""

    reason: str


FromHost = Welcome | HostReport | Refusal


def told(request: Request) -> EndedRequest:
    """An outcome on the engine's host, its times as seconds since the request came."""
    first, came = request.first_scheduled, request.arrival
    return msgspec.structs.replace(
        EndedRequest.of(request),
        first_scheduled=None if first is None else first - came,
        finished_at=request.finished_at - came,
    )


def heard(ended: EndedRequest, request: Request) -> None:
    """Writes such an outcome into the front's own copy of the request."""
    ended.complete(request)
    request.finished_at += request.arrival
    if request.first_scheduled is not None:
        request.first_scheduled += request.arrival
