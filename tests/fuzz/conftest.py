"""One server for all that is thrown at it; it must be idle and whole afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.running_server import RunningServer, running_server
from tests.toy_models import toy_config, write_toy_model

IDLE_SECONDS = 60


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Serves a toy model that retrieves and reads times; nobody may administer it."""
    model_dir = write_toy_model(tmp_path_factory.mktemp("models") / "toy", toy_config())
    flags = ("--pool-bytes", "300000", "--max-body-bytes", "1MiB", "--poison-freed-memory")
    with running_server(model_dir, *flags, "--log-level", "warning") as running:
        yield running
        until = time.monotonic() + IDLE_SECONDS
        while running.get("/load").json()["server_load"]:
            assert time.monotonic() < until, "requests still run that nobody waits for"
        held = [
            sample.value
            for family in text_string_to_metric_families(running.get("/metrics").text)
            for sample in family.samples
            if sample.name == "helm:kv_cache_usage_perc"
        ]
        assert held == [0.0]
        assert running.get("/health").status_code == 200
        # A core whose books do not add up ends with another status.
        assert running.stop() == 0
