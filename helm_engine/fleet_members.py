"""The members of a front's fleet, by its configuration."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

from helm_engine.config import EngineConfig, ServerConfig
from helm_engine.engine_client import EngineClient
from helm_engine.engine_supervisor import EngineSupervisor
from helm_engine.fleet_member import FleetMember
from helm_engine.input_processor import new_user_key
from helm_engine.remote_engine import RemoteEngine
from router.policies import policy_named


def make_members(config: EngineConfig, server: ServerConfig) -> list[FleetMember]:
    """The engines that the front runs itself, and those of other hosts.

    Args:
        config: of each engine of its own.
        server: of the front.

    Raises:
        ValueError: several engines cannot have the one address for events that was given.
    """
    fleet = server.fleet
    if fleet.num_engines > 1 and config.residency.endpoint is not None:
        raise ValueError(
            "kv_events_endpoint: is for one engine; several have addresses of their own"
        )
    # One key for all: a user's tag must not change with the engine.
    user_key = fleet.user_key or new_user_key()
    number = fleet.num_engines
    policy = policy_named(fleet.policy)
    start = partial(
        EngineClient,
        hang_seconds=server.hang_timeout,
        tells_residency=number + len(fleet.remote) > 1 and (policy.knows_kv or policy.knows_rows),
    )
    members: list[FleetMember] = [
        EngineSupervisor(
            config if number == 1 else one_of_several(config, place, number),
            start,
            server.start_timeout,
            str(place),
            user_key,
        )
        for place in range(number)
    ]
    return members + [
        RemoteEngine(address, user_key, server.hang_timeout) for address in fleet.remote
    ]


def one_of_several(config: EngineConfig, place: int, number: int) -> EngineConfig:
    """The configuration of one of several engines on this machine.

    They share the processor's cores evenly, and have a decision log each; which GPU each has the
    engine finds out itself (`select_device`).
    """
    threads = max(1, num_cores() // number)
    controller, log = config.controller, config.controller.decision_log
    if log is not None:
        controller = replace(controller, decision_log=log.with_stem(f"{log.stem}-{place}"))
    return replace(
        config,
        executor=replace(config.executor, place=place, num_engines=number, num_threads=threads),
        controller=controller,
    )


def num_cores() -> int:
    """Cores that this process may use, or as many as the operator granted numeric libraries."""
    granted = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0))
    return min(cores, int(granted)) if granted.isdecimal() and int(granted) else cores
