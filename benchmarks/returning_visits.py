"""Visits of returning users as request bodies, and the model directories that answer them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.dlrmv3_mini import NUM_USERS, Variant, make_model_dir, mini_config
from helm_engine.datasets.ml100k import cache_directory
from helm_engine.datasets.returning_users import ReturningUsers, ReturningUsersConfig, Visit
from model_executor.checkpoint import CONFIG_FILE, load_config

NUM_CANDIDATES = 256
NUM_ITEMS = 1_000_000
NEW_EVENTS = 10
WEIGHT_SEED = 1


@dataclass(frozen=True, slots=True)
class Asked:
    """One visit as the two systems of a comparison get it."""

    returning: bool
    history: int
    with_user: bytes
    """JSON body that allows reuse."""
    without_user: bytes
    """The same without a user, so that nothing may be reused."""


def model_dir(variant: Variant, history: int, num_items: int = NUM_ITEMS) -> Path:
    """The directory of a mini model, made when it is not there or is another's."""
    config = mini_config(variant, history, num_items)
    size = "" if num_items == NUM_ITEMS else f"-{num_items}"
    directory = cache_directory() / f"dlrmv3-mini-{variant}-{history}{size}"
    if not (directory / CONFIG_FILE).is_file() or load_config(directory) != config:
        make_model_dir(directory, config, WEIGHT_SEED)
    return directory


def returning_visits(
    variant: Variant,
    history: int,
    returns: int,
    users: int,
    seed: int,
    num_items: int = NUM_ITEMS,
) -> Iterator[Asked]:
    """An endless stream: users begin `returns` visits short of a history of `history` events."""
    config = ReturningUsersConfig(
        num_items=num_items,
        num_users=users,
        first_history=history - NEW_EVENTS * returns,
        new_events=NEW_EVENTS,
        max_history=history,
        num_candidates=NUM_CANDIDATES,
        recent_users=float(users),
        seed=seed,
    )
    for visit in ReturningUsers(config).visits():
        body = _body(variant, visit)
        yield Asked(
            returning=visit.visit_index > 0,
            history=len(visit.history.item_ids),
            with_user=json.dumps({"user": f"user-{visit.user}", **body}).encode(),
            without_user=json.dumps(body).encode(),
        )


def _body(variant: Variant, visit: Visit) -> dict[str, Any]:
    history: dict[str, Any] = {"item_ids": visit.history.item_ids.tolist()}
    candidates: dict[str, Any] = {"item_ids": visit.candidates.item_ids.tolist()}
    body = {"history": history, "candidates": candidates}
    if variant == "abs":
        return body
    history["actions"] = visit.history.actions.tolist()
    history["timestamps"] = visit.history.timestamps.tolist()
    history["category_id"] = visit.history.category_ids.tolist()
    candidates["category_id"] = visit.candidates.category_ids.tolist()
    context = {"user_id": visit.user % NUM_USERS}
    return {**body, "context": context, "request_time": visit.request_time}
