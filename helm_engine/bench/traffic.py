"""What is asked: bodies of returning users that the served model accepts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from helm_engine.bench.target import Target
from helm_engine.datasets.event_model import Int64Array
from helm_engine.datasets.returning_users import ReturningUsers, ReturningUsersConfig, Visit
from model_executor.model_config import ModelConfig

DEFAULT_HISTORY = 512
DEFAULT_CANDIDATES = 100
_MAX_ITEMS = 2**27
"""Popularity is drawn from tables over the catalogue, 8 bytes for an item; of a larger catalogue
the first items are asked for."""
_RECENT_USERS = 64
_LEAST_PER_CATEGORY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficConfig:
    """Who comes and what they ask."""

    users: int = 100
    """Who come and go; one who outgrows what the model reads is replaced."""
    history: int | None = None
    """Events at a user's first visit; None = half of what the model reads, at most 512."""
    new_events: int = 10
    """Events that join from one visit to the next."""
    candidates: int | None = None
    """Items to score; 0 = retrieve from the whole catalogue; None = 100, or what is allowed."""
    top_k: int = 10
    item_zipf: float = 1.0
    """Exponent of the items' popularity; 0 = all alike."""
    deadline_ms: float | None = None
    seed: int = 0


def request_bodies(target: Target, config: TrafficConfig) -> Iterator[bytes]:
    """An endless stream of JSON bodies, the same for the same arguments.

    Raises:
        ValueError: names the flag and the limit of the server that it breaks.
    """
    model, limits = target.model, target.limits
    history = config.history or max(1, min(DEFAULT_HISTORY, model.max_sequence_len // 2))
    allowed = min(limits.max_candidates, getattr(model, "max_candidates", limits.max_candidates))
    asked = config.candidates
    candidates = min(DEFAULT_CANDIDATES, allowed) if asked is None else asked
    if history > limits.max_history_events:
        raise ValueError(f"--history: the server takes at most {limits.max_history_events} events")
    if candidates > allowed:
        raise ValueError(f"--candidates: the server takes at most {allowed}")
    if candidates == 0 and model.candidates_in_sequence:
        raise ValueError("--candidates: this model ranks, it needs at least 1")
    users = ReturningUsers(_users_config(model, config, history, candidates))
    return _bodies(users, model, config, candidates)


def _users_config(
    model: ModelConfig, config: TrafficConfig, history: int, candidates: int
) -> ReturningUsersConfig:
    num_items = min(model.num_items, _MAX_ITEMS)
    num_categories = min(128, max(1, num_items // _LEAST_PER_CATEGORY))
    return ReturningUsersConfig(
        num_items=num_items,
        num_categories=num_categories,
        categories_per_user=min(4, num_categories),
        item_zipf=config.item_zipf,
        num_users=config.users,
        recent_users=float(min(_RECENT_USERS, config.users)),
        first_history=history,
        max_history=max(history, model.max_sequence_len),
        new_events=config.new_events,
        # New events are among the items that the generator shows.
        num_candidates=max(candidates, config.new_events),
        seed=config.seed,
    )


def _bodies(
    users: ReturningUsers, model: ModelConfig, config: TrafficConfig, candidates: int
) -> Iterator[bytes]:
    for visit in users.visits():
        body = request_body(model, visit, candidates) | {"top_k": config.top_k}
        if candidates:
            body["top_k"] = min(config.top_k, candidates)
        if config.deadline_ms is not None:
            body["deadline_ms"] = config.deadline_ms
        yield json.dumps(body, separators=(",", ":")).encode()


def request_body(model: ModelConfig, visit: Visit, candidates: int) -> dict[str, Any]:
    """A visit as a request that a model accepts, with nothing that it does not read.

    Args:
        model: the model's config.
        visit: its items count from 0, whatever the model's first id is.
        candidates: how many of the visit's candidates to send; 0 = none, retrieve.
    """
    history = _events(model, visit.history.item_ids)
    body: dict[str, Any] = {"user": f"user-{visit.user}", "history": history}
    if model.uses_timestamps:
        history["timestamps"] = visit.history.timestamps.tolist()
        body["request_time"] = visit.request_time
    if model.num_actions:
        history["actions"] = np.remainder(visit.history.actions, model.num_actions).tolist()
    if candidates:
        body["candidates"] = _events(model, visit.candidates.item_ids[:candidates])
    if model.contextual_features:
        body["context"] = {one.name: visit.user % one.num_rows for one in model.contextual_features}
    return body


def _events(model: ModelConfig, items: Int64Array) -> dict[str, Any]:
    """Items with their features, which an item always has alike."""
    events = {"item_ids": (items + model.first_item_id).tolist()}
    for feature in model.item_features:
        events[feature.name] = np.remainder(items, feature.num_rows).tolist()
    return events
