"""Flags that do not go with Ray, or not without it, are refused by name before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helm_engine.config import (
    EngineConfig,
    ExecutorConfig,
    FleetConfig,
    ResidencyConfig,
    ServerConfig,
)
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.entrypoints.ray_options import RayOptions

ENGINE, SERVER = EngineConfig(Path("m")), ServerConfig()
REMOTE = FleetConfig(num_engines=0, remote=("tcp://10.0.0.7:7000",), user_key=bytes(32))


def fleet(**values: Any) -> ServerConfig:
    return replace(SERVER, fleet=FleetConfig(**values))


def residency(**values: Any) -> EngineConfig:
    return replace(ENGINE, residency=ResidencyConfig(**values))


@pytest.mark.parametrize(
    ("field", "config", "server"),
    [
        ("engine", ENGINE, replace(SERVER, fleet=REMOTE)),
        ("hedge_ms", ENGINE, fleet(hedge_ms=5.0)),
        ("suspect_timeout", ENGINE, fleet(suspect_timeout=3.0)),
        ("kv_events_endpoint", residency(endpoint="tcp://*:7001"), SERVER),
        ("engine_name", residency(engine_name="a"), SERVER),
        ("record_trace", ENGINE, replace(SERVER, record_trace=Path("t"))),
        (
            "decision_log",
            replace(ENGINE, controller=ControllerConfig(decision_log=Path("d"))),
            SERVER,
        ),
        ("device", replace(ENGINE, executor=ExecutorConfig(device="cuda:1")), SERVER),
    ],
)
def test_what_does_not_go_with_ray_is_refused(
    field: str, config: EngineConfig, server: ServerConfig
) -> None:
    with pytest.raises(ValueError, match=f"{field}: .* --ray"):
        RayOptions(ray=True).check_server(config, server)
    RayOptions().check_server(config, server)


def test_what_needs_ray_is_refused_without_it() -> None:
    for options in (RayOptions(ray_address="auto"), RayOptions(ray_cpus=2)):
        with pytest.raises(ValueError, match="need --ray"):
            options.check(ENGINE)
    with pytest.raises(ValueError, match="num_fronts: needs --ray"):
        RayOptions().check_server(ENGINE, fleet(num_fronts=2))
    RayOptions(ray=True, ray_cpus=2).check_server(ENGINE, fleet(num_fronts=2, num_engines=3))
