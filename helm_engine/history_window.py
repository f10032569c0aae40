"""Which of the events that a client sent the model reads."""

from __future__ import annotations

from typing import NamedTuple

from model_executor.model_config import ModelConfig


class HistoryWindow(NamedTuple):
    """Events first .. last - 1 of those sent."""

    first: int
    last: int
    begins_later: bool
    """The first event read is not the user's first, so positions moved when it last changed."""


def window_of(config: ModelConfig, num_sent: int, start_index: int) -> HistoryWindow:
    """Cuts a history to what the model reads.

    A window of the newest events begins at a multiple of the model's anchor stride in the user's
    own count of events, so that it stays where it is while that many events come. A client that
    cut its history above the anchor gets all that it sent read.

    Args:
        config: the model's.
        num_sent: events sent.
        start_index: events of the user before the first one sent.
    """
    limit = config.max_sequence_len
    if config.truncation == "oldest":
        return HistoryWindow(0, min(num_sent, limit), begins_later=start_index > 0)
    beyond = max(0, start_index + num_sent - limit)
    anchor = -(-beyond // config.anchor_stride) * config.anchor_stride
    first = max(0, anchor - start_index)
    return HistoryWindow(first, num_sent, begins_later=max(anchor, start_index) > 0)
