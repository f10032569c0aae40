"""What a model reads of a client's request, from the description of the fields alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_executor.model_config import ModelConfig

Body = Mapping[str, Any]
"""A request as a client writes it, in JSON's types."""


def events_read(config: ModelConfig, body: Body) -> list[int]:
    """Places, in the arrays sent, of the events that the model reads, oldest first."""
    num_sent = len(body["history"]["item_ids"])
    if config.truncation == "oldest":
        return list(range(min(num_sent, config.max_sequence_len)))
    # Both count from the user's very first event.
    first_sent = body["history"].get("start_index", 0)
    window = 0
    while first_sent + num_sent - window > config.max_sequence_len:
        window += config.anchor_stride
    return [place for place in range(num_sent) if first_sent + place >= window]


def time_of_request(body: Body) -> int:
    """Seconds; without one of its own it is the time of the last event sent."""
    asked_at: int | None = body.get("request_time")
    last: int = body["history"]["timestamps"][-1]
    return last if asked_at is None else asked_at


def items_scored(config: ModelConfig, body: Body) -> list[int]:
    """The candidates, or the whole catalogue where there are none."""
    if body.get("candidates") is None:
        return list(range(config.first_item_id, config.first_item_id + config.num_items))
    sent: list[int] = body["candidates"]["item_ids"]
    return sent
