"""Which events are read: an obvious search over all windows, and what reuse needs of them."""

from __future__ import annotations

from itertools import count, groupby
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helm_engine.history_window import HistoryWindow, window_of
from model_executor.model_config import ModelConfig
from tests.toy_models import toy_config


def config_of(limit: int, stride: int = 1, truncation: str = "newest") -> ModelConfig:
    return toy_config("sasrec", max_sequence_len=limit, anchor_stride=stride, truncation=truncation)


def events_read(config: ModelConfig, num_sent: int, start_index: int) -> list[int]:
    """The events read, in the user's own count of events."""
    window = window_of(config, num_sent, start_index)
    return [start_index + place for place in range(num_sent)[window.first : window.last]]


def events_by_search(
    limit: int, stride: int, truncation: str, num_sent: int, start_index: int
) -> list[int]:
    """Tries one window after another until one is short enough."""
    sent = list(range(start_index, start_index + num_sent))
    if truncation == "oldest":
        return sent[:limit]
    for anchor in count(0, stride):
        window = range(anchor, start_index + num_sent)
        if len(window) <= limit:
            return [event for event in sent if event in window]
    raise AssertionError("no window is short enough")


strides = st.integers(1, 12).flatmap(lambda limit: st.tuples(st.just(limit), st.integers(1, limit)))
truncations: st.SearchStrategy[Literal["newest", "oldest"]] = st.sampled_from(["newest", "oldest"])


@given(
    sizes=strides,
    truncation=truncations,
    num_sent=st.integers(1, 60),
    start_index=st.integers(0, 60),
)
def test_window_is_the_one_that_a_search_finds(
    sizes: tuple[int, int], truncation: str, num_sent: int, start_index: int
) -> None:
    config = config_of(*sizes, truncation)
    want = events_by_search(*sizes, truncation, num_sent, start_index)
    assert events_read(config, num_sent, start_index) == want
    # It begins later than the user does where event 0 is not its first.
    assert window_of(config, num_sent, start_index).begins_later == (want[0] != 0)


@given(
    sizes=strides,
    truncation=truncations,
    num_sent=st.integers(1, 2**20),
    start_index=st.integers(0, 2**53 - 1),
)
def test_at_least_one_event_is_read_and_never_more_than_the_limit(
    sizes: tuple[int, int], truncation: str, num_sent: int, start_index: int
) -> None:
    window = window_of(config_of(*sizes, truncation), num_sent, start_index)
    assert 0 <= window.first < window.last <= num_sent
    assert window.last - window.first <= sizes[0]


# ---------------------------------------------------------------- users who return


@given(sizes=strides, spare=st.none() | st.integers(0, 20))
def test_window_stays_where_it_is_for_a_stride_of_events(
    sizes: tuple[int, int], spare: int | None
) -> None:
    """Event after event, sent whole or cut by the client to the newest, more than are read."""
    limit, stride = sizes
    config = config_of(limit, stride)
    firsts = []
    for total in range(1, limit + 5 * stride + 1):
        kept = total if spare is None else min(total, limit + spare)
        events = events_read(config, kept, start_index=total - kept)
        assert events[-1] == total - 1
        firsts.append(events[0])
    runs = [(first, len(list(same))) for first, same in groupby(firsts)]
    assert runs == [(0, limit)] + [(stride * number, stride) for number in range(1, 6)]


@given(sizes=strides, total=st.integers(1, 80), share=st.floats(0.0, 1.0))
def test_history_cut_by_the_client_before_the_window_changes_nothing(
    sizes: tuple[int, int], total: int, share: float
) -> None:
    config = config_of(*sizes)
    whole = events_read(config, total, start_index=0)
    cut = round(share * whole[0])
    assert events_read(config, total - cut, start_index=cut) == whole


@given(sizes=strides, total=st.integers(1, 80), share=st.floats(0.0, 1.0))
def test_history_cut_by_the_client_inside_the_window_is_read_whole(
    sizes: tuple[int, int], total: int, share: float
) -> None:
    config = config_of(*sizes)
    first = events_read(config, total, start_index=0)[0]
    cut = first + round(share * (total - 1 - first))
    assert events_read(config, total - cut, start_index=cut) == list(range(cut, total))


@given(sizes=strides, num_sent=st.integers(1, 60), more=st.integers(1, 60))
def test_oldest_events_stay_the_same_however_many_follow(
    sizes: tuple[int, int], num_sent: int, more: int
) -> None:
    config = config_of(*sizes, "oldest")
    before = events_read(config, num_sent, start_index=0)
    assert events_read(config, num_sent + more, start_index=0)[: len(before)] == before


# ---------------------------------------------------------------- worked by hand


@pytest.mark.parametrize(
    ("limit", "stride", "truncation", "num_sent", "start_index", "window"),
    [
        (10, 1, "newest", 10, 0, HistoryWindow(0, 10, False)),
        (10, 1, "newest", 11, 0, HistoryWindow(1, 11, True)),
        (10, 4, "newest", 11, 0, HistoryWindow(4, 11, True)),
        (10, 4, "newest", 14, 0, HistoryWindow(4, 14, True)),
        (10, 4, "newest", 15, 0, HistoryWindow(8, 15, True)),
        (10, 4, "newest", 12, 3, HistoryWindow(5, 12, True)),
        (10, 4, "newest", 3, 12, HistoryWindow(0, 3, True)),
        (10, 4, "newest", 3, 5, HistoryWindow(0, 3, True)),
        (10, 10, "newest", 11, 0, HistoryWindow(10, 11, True)),
        (10, 4, "oldest", 15, 0, HistoryWindow(0, 10, False)),
        (10, 4, "oldest", 15, 3, HistoryWindow(0, 10, True)),
        (10, 4, "oldest", 2, 0, HistoryWindow(0, 2, False)),
    ],
)
def test_windows_worked_by_hand(
    limit: int,
    stride: int,
    truncation: str,
    num_sent: int,
    start_index: int,
    window: HistoryWindow,
) -> None:
    assert window_of(config_of(limit, stride, truncation), num_sent, start_index) == window
