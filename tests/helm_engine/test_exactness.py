"""The exactness gate: whatever is cached, chunked, split or batched, the scores are the same."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helm_engine.request import ReuseBlocked
from tests.helm_engine.clients import Client
from tests.helm_engine.scenarios import Scenario, scenarios
from tests.helm_engine.served import Served, serve
from tests.toy_models import TOY_CONFIGS, toy_config

every_dialect = pytest.mark.parametrize("dialect", TOY_CONFIGS)


@every_dialect
def test_cold_scores_equal_the_reference(dialect: str, tmp_path: Path) -> None:
    served = serve(tmp_path, toy_config(dialect))
    client = Client(served.config, num_events=24)
    asked_at = client.events["timestamps"][-1] + 77
    usage = served.ask(client.request(client.candidates(40), request_time=asked_at))
    assert usage.cached_tokens == 0


@every_dialect
def test_one_event_and_one_candidate_are_enough(dialect: str, tmp_path: Path) -> None:
    client = Client(toy_config(dialect), num_events=1)
    usage = serve(tmp_path, client.config).ask(client.request(client.candidates(1)))
    assert usage.candidates == 1


@pytest.mark.parametrize(("dialect", "reused"), [("research", 16), ("nvidia", 36), ("sasrec", 16)])
def test_a_returning_user_reuses_kv_and_gets_the_same_scores(
    dialect: str, reused: int, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config(dialect))
    client = Client(served.config, num_events=24)
    for length in (13, 14, 19, 24):
        usage = served.ask(client.request(client.candidates(20), length=length))
    # The full blocks of four final tokens that the history of 19 has left.
    assert usage.cached_tokens == reused


@every_dialect
@pytest.mark.parametrize("budget", [2, 3, 5, 11])
def test_chunks_and_micro_batches_change_no_score(
    dialect: str, budget: int, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config(dialect), max_num_batched_tokens=budget)
    client = Client(served.config, budget, num_events=23)
    # With 50 candidates the feature of the `stu` model that needs a long sequence counts.
    usage = served.ask(client.request(client.different_candidates(50)))
    assert served.scheduler.stats.steps >= (usage.history_tokens + 50) // budget


@every_dialect
def test_strangers_in_the_same_steps_change_no_score(dialect: str, tmp_path: Path) -> None:
    served = serve(tmp_path, toy_config(dialect), num_pages=80, max_num_batched_tokens=37)
    clients = [Client(served.config, seed, user=f"u{seed}", num_events=24) for seed in range(7)]
    lengths = [1, 24, 5, 17, 2, 11, 23]
    for _ in range(2):
        served.ask_all(
            [
                client.request(client.candidates(1 + length), length=length)
                for client, length in zip(clients, lengths, strict=True)
            ]
        )
    assert served.scheduler.stats.prefix_hits


@every_dialect
def test_kv_is_never_shared_between_users_nor_without_one(dialect: str, tmp_path: Path) -> None:
    served = serve(tmp_path, toy_config(dialect))
    client = Client(served.config, num_events=20)
    body = client.request(client.candidates(5))
    served.ask({**body, "user": "a"})
    assert served.ask({**body, "user": "a"}).cached_tokens
    assert served.ask({**body, "user": "b"}).cached_tokens == 0
    for _ in range(2):
        anonymous = served.ask({**body, "user": None})
        assert anonymous.cached_tokens == 0
        assert anonymous.reuse_blocked == ReuseBlocked.NO_USER


def test_the_hour_of_a_request_is_not_rounded_up(tmp_path: Path) -> None:
    served = serve(tmp_path, toy_config("stu"))
    client = Client(served.config, num_events=2)
    # Exact in fp32 and 16 seconds before the hour; in fp32, divided by 3600, it is a whole number.
    usage = served.ask(client.request(client.candidates(9), request_time=1_700_009_984))
    assert usage.candidates == 9


# ---------------------------------------------------------------- any mix of all that


def _edit(client: Client, rng: np.random.Generator) -> None:
    """Now and then the past changes, or what is known about the user."""
    place = int(rng.integers(len(client)))
    if rng.random() < 0.15:
        client.change(str(rng.choice([*client.events])), place)
    if rng.random() < 0.1:
        client.insert_late(place)
    if client.context and rng.random() < 0.1:
        client.change_context(str(rng.choice([*client.context])))


def _visit(client: Client, rng: np.random.Generator) -> dict[str, Any]:
    """A few events later, asked at some time with some or all of the history."""
    client.grow(int(rng.integers(0 if len(client) else 1, 9)))
    _edit(client, rng)
    body = client.request(
        client.candidates(int(rng.integers(1, 41))),
        start_index=int(rng.integers(len(client))) if rng.random() < 0.2 else 0,
    )
    if rng.random() < 0.7:
        later = int(rng.choice([0, 30, 5000]))
        body["request_time"] = client.events["timestamps"][-1] + later
    if rng.random() < 0.1:
        body["user"] = None
    if not client.config.candidates_in_sequence and rng.random() < 0.3:
        body |= {"candidates": None, "top_k": client.config.num_items}
    return body


def _play(served: Served, scenario: Scenario) -> None:
    rng = np.random.default_rng(scenario.seed)
    clients = [
        Client(served.config, scenario.seed + place, user=f"u{place}")
        for place in range(scenario.num_users)
    ]
    keeps_kv = served.recommender.engine.served.capabilities.chunkable.value
    for _ in range(scenario.num_rounds):
        bodies = [_visit(client, rng) for client in clients]
        used = served.ask_all(bodies)
        if rng.random() < 0.3:
            used += served.ask_all(bodies)
        assert keeps_kv or not any(usage.cached_tokens for usage in used)


@every_dialect
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_of_reuse_chunks_and_strangers_gives_the_reference_scores(
    dialect: str, data: st.DataObject
) -> None:
    scenario = data.draw(scenarios(dialect))
    with tempfile.TemporaryDirectory() as directory:
        served = serve(
            Path(directory), scenario.config, seed=scenario.seed % 1000, **scenario.engine
        )
        _play(served, scenario)
