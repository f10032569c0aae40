"""Every refusal is needed: forced, it breaks scores; and what is allowed beside it is exact.

Requests are forged: given hashes of fewer inputs than their tokens depend on, or hashes where the
engine makes none; and the scheduler is told to split what it must not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from block_manager.block_hash import hash_blocks, root_hash
from helm_engine.request import Request, ReuseBlocked
from model_executor.capabilities import StepRules
from model_executor.inputs.stu import POSITION, TIME_BUCKET
from model_executor.step import Int64Array
from tests.helm_engine.clients import Client
from tests.helm_engine.served import BREAKS, TOLERANCE, Served, serve
from tests.toy_models import toy_config

BLOCK = 4
CONTEXTUAL = [{"name": "user_id", "num_rows": 5000}, {"name": "device", "num_rows": 4}]
# Contextual rows that read the whole history; in `stu` they weigh little, unless n is small.
READS_AHEAD: dict[str, dict[str, Any]] = {
    "nvidia": {"contextual": CONTEXTUAL, "num_layers": 2},
    "stu": {
        "contextual": CONTEXTUAL,
        "contextual_rows_see_history": True,
        "max_candidates": 12,
        "attention_scale": 2.0,
    },
}
reads_ahead = pytest.mark.parametrize("dialect", READS_AHEAD)


def body_of(client: Client, **fields: Any) -> dict[str, Any]:
    """A request whose scores can be compared one by one."""
    return client.request(client.different_candidates(9), **fields)


def forge(request: Request, inputs: Int64Array) -> Request:
    """The same request, with hashes of these inputs of its tokens."""
    return replace(request, block_hashes=hash_blocks(root_hash("forged", b"u"), inputs, BLOCK))


def all_inputs(request: Request) -> Int64Array:
    """Everything that the engine would hash."""
    return request.tokens.hash_inputs()


def forged_errors(served: Served, bodies: list[dict[str, Any]], inputs: list[Int64Array]) -> float:
    """Runs the forged requests; how far the last one is off, of which 12 tokens or more hit."""
    error = np.nan
    for place, body in enumerate(bodies):
        forged = forge(served.prepare(body, str(place)), inputs[place])
        error = served.error_of(forged, body)
        if place == 0:
            assert error <= TOLERANCE
    assert forged.cached_tokens >= 12
    return error


# ---------------------------------------------------------------- the last row


def test_reusing_the_last_row_would_break_scores(tmp_path: Path) -> None:
    served = serve(tmp_path, toy_config("research"))
    client = Client(served.config, num_events=13)
    long_after = client.events["timestamps"][12] + 9_000_000
    bodies = [body_of(client, length=12, request_time=long_after), body_of(client)]
    # Hashes without the time of the next event, which is the request's for the last row.
    items = np.array(client.events["item_ids"])[:, None]
    assert forged_errors(served, bodies, [items[:12], items]) > BREAKS


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("dialect", ["research", "nvidia", "sasrec"])
def test_reusing_kv_across_a_shifted_window_would_break_scores(
    dialect: str, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config(dialect))
    client = Client(served.config, num_events=30)
    shifted = 4 * served.config.tokens_per_event
    bodies = [body_of(client, start_index=4, length=20), body_of(client, length=20)]
    first, second = (all_inputs(served.prepare(body, "unused")) for body in bodies)
    # The first window's tokens; in the second they stand four events further from the oldest.
    assert (first == second[shifted:]).all()
    assert forged_errors(served, bodies, [first, first]) > BREAKS


def test_reusing_stu_kv_across_a_grown_history_would_break_scores(tmp_path: Path) -> None:
    served = serve(tmp_path, toy_config("stu"))
    client = Client(served.config, num_events=20)
    bodies = [body_of(client, length=16), body_of(client)]
    # Hashes without position and age, which count from the newest event.
    left_out = 1 + np.array([POSITION, TIME_BUCKET])
    inputs = [
        np.delete(all_inputs(served.prepare(body, "unused")), left_out, axis=1) for body in bodies
    ]
    assert (inputs[0] == inputs[1][:18]).all()
    assert forged_errors(served, bodies, inputs) > BREAKS


# ---------------------------------------------------------------- contextual rows that read ahead


@reads_ahead
def test_reusing_kv_behind_contextual_rows_that_read_ahead_would_break_scores(
    dialect: str, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config(dialect, **READS_AHEAD[dialect]))
    client = Client(served.config, num_events=20)
    bodies = [body_of(client)]
    for place in range(10, 20):
        client.change("item_ids", place)
        client.change("actions", place)
    bodies.append(body_of(client))
    # All that the reused tokens are made of is the same; only newer events are other ones.
    inputs = [all_inputs(served.prepare(body, "unused")) for body in bodies]
    assert (inputs[0][:12] == inputs[1][:12]).all()
    assert forged_errors(served, bodies, inputs) > BREAKS


@reads_ahead
def test_chunking_behind_contextual_rows_that_read_ahead_would_break_scores(
    dialect: str, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config(dialect, **READS_AHEAD[dialect]))
    body = body_of(Client(served.config, num_events=20))
    assert served.error_of(served.prepare(body, "whole"), body) <= TOLERANCE
    scheduler = served.scheduler
    scheduler.config = replace(scheduler.config, max_num_batched_tokens=3)
    scheduler.rules = StepRules(chunkable=True, recomputes_last_row=False)
    assert served.error_of(served.prepare(body, "chunks"), body) > BREAKS


@reads_ahead
def test_a_context_that_reads_ahead_is_computed_anew_each_time(
    dialect: str, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config(dialect, **READS_AHEAD[dialect]))
    client = Client(served.config, num_events=20)
    for _ in range(2):
        usage = served.ask(body_of(client))
        assert usage.cached_tokens == 0
        assert usage.reuse_blocked == ReuseBlocked.MODEL


@pytest.mark.parametrize(("dialect", "reused"), [("nvidia", 40), ("stu", 20)])
def test_in_one_layer_contextual_rows_that_read_ahead_are_chunked_and_reused(
    dialect: str, reused: int, tmp_path: Path
) -> None:
    config = toy_config(dialect, **(READS_AHEAD[dialect] | {"num_layers": 1}))
    served = serve(tmp_path, config, max_num_batched_tokens=5)
    client = Client(config, num_events=20)
    for cached in (0, reused):
        usage = served.ask(body_of(client))
        assert usage.cached_tokens == cached
    assert served.scheduler.stats.steps >= (usage.history_tokens + 9) // 5


def test_in_one_layer_nvidia_kv_behind_contextual_rows_serves_a_grown_history(
    tmp_path: Path,
) -> None:
    served = serve(tmp_path, toy_config("nvidia", contextual=CONTEXTUAL, num_layers=1))
    client = Client(served.config, num_events=20)
    served.ask(body_of(client, length=12))
    assert served.ask(body_of(client)).cached_tokens == 24


# ---------------------------------------------------------------- groups of candidates


def test_cutting_a_group_of_candidates_would_break_scores(tmp_path: Path) -> None:
    config = toy_config("nvidia", target_group_size=3)
    served = serve(tmp_path, config, max_num_batched_tokens=4)
    body = body_of(Client(config, num_events=5))
    assert served.scheduler.rules.microbatch_unit == 3
    assert served.error_of(served.prepare(body, "groups"), body) <= TOLERANCE
    served.scheduler.rules = StepRules(microbatch_unit=1, recomputes_last_row=False)
    assert served.error_of(served.prepare(body, "cut"), body) > BREAKS


# ---------------------------------------------------------------- what the engine says

SAYS = [
    ("research", {}, True, True, 1),
    ("stu", {}, False, True, 1),
    ("stu", READS_AHEAD["stu"], False, False, 1),
    ("nvidia", {"target_group_size": 4}, True, True, 4),
    ("nvidia", READS_AHEAD["nvidia"], False, False, 1),
    ("sasrec", {}, True, True, 1),
]


@pytest.mark.parametrize(("dialect", "changes", "reuse", "chunkable", "unit"), SAYS)
def test_engine_says_what_it_allows_and_why(
    dialect: str,
    changes: dict[str, Any],
    reuse: bool,
    chunkable: bool,
    unit: int,
    tmp_path: Path,
) -> None:
    served = serve(tmp_path, toy_config(dialect, **changes))
    said = served.recommender.engine.served.capabilities.describe()
    assert {name: one["value"] for name, one in said.items()} == {
        "cross_request_reuse": reuse,
        "chunkable": chunkable,
        "microbatch_unit": unit,
    }
    assert all(" " in one["reason"] for one in said.values())
    rules = served.scheduler.rules
    assert (rules.chunkable, rules.microbatch_unit) == (chunkable, unit)
