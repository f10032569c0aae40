"""A model that multiplies rounding: what the gate allows it, and that faults show all the same.

Rows that attend to little have an output norm of few, almost equal numbers: the second layer of
this model multiplies what the first one rounds by 74, the third by 30.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_executor.models.research import ResearchHSTU
from tests.helm_engine.clients import START
from tests.helm_engine.served import ROUNDINGS, TOLERANCE, Served, serve
from tests.toy_models import toy_config

MULTIPLIES: dict[str, Any] = {
    "num_heads": 1,
    "dqk": 2,
    "dv": 4,
    "max_sequence_len": 7,
    "max_output_len": 1,
    "num_time_buckets": 8,
    "layer_norm_eps": 1e-4,
}
SEED = 92
OF_SCORES = r"^\(\d"
"""The assertion that fails names the error first."""


def body_of(num_events: int) -> dict[str, Any]:
    """Seconds between events, so that each has a time bucket of its own."""
    times = [START + place**2 for place in range(num_events)]
    history = {"item_ids": [16, 3, 44, 58, 7][:num_events], "timestamps": times}
    return {"history": history, "candidates": None, "top_k": 60, "request_time": times[-1] + 3}


def skip_the_first_event(model: ResearchHSTU) -> None:
    model.rule = replace(model.rule, window=3)


def divide_by_one_more(model: ResearchHSTU) -> None:
    model.rule = replace(model.rule, normaliser=model.rule.normaliser + 1)


def count_half_of_the_time(model: ResearchHSTU) -> None:
    model.time_edges.mul_(2)


def model_of(served: Served) -> ResearchHSTU:
    model = served.recommender.engine.runner.model
    assert isinstance(model, ResearchHSTU)
    return model


@pytest.mark.parametrize("attention", ["cpu", "torch"])
def test_a_model_that_multiplies_rounding_is_held_to_what_it_makes_of_a_digit(
    attention: str, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config("research", **MULTIPLIES), SEED, attention)
    body = {**body_of(1), "request_time": START}
    served.ask(body)
    assert TOLERANCE < ROUNDINGS * served.shaken(body) < 10 * TOLERANCE
    divide_by_one_more(model_of(served))
    with pytest.raises(AssertionError, match=OF_SCORES):
        served.ask(body)


@pytest.mark.parametrize("changes", [{}, MULTIPLIES], ids=["ordinary", "multiplies"])
@pytest.mark.parametrize(
    "fault", [skip_the_first_event, divide_by_one_more, count_half_of_the_time]
)
def test_a_planted_fault_is_caught(
    fault: Callable[[ResearchHSTU], None], changes: dict[str, Any], tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config("research", **changes), SEED)
    body = body_of(5)
    served.ask(body)
    fault(model_of(served))
    with pytest.raises(AssertionError, match=OF_SCORES):
        served.ask(body)
