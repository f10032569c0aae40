"""Exact scores when the model or the client leaves events out, and which KV survives that."""

from __future__ import annotations

from pathlib import Path

import pytest

from helm_engine.request import ReuseBlocked
from tests.helm_engine.clients import Client
from tests.helm_engine.served import serve
from tests.toy_models import TOY_CONFIGS, toy_config

every_dialect = pytest.mark.parametrize("dialect", TOY_CONFIGS)
# Those whose positions count from the oldest event read; their windows hold 24 events.
keeps_kv = pytest.mark.parametrize("dialect", ["research", "nvidia", "sasrec"])


@keeps_kv
def test_a_window_that_begins_at_every_event_misses_and_says_so(
    dialect: str, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config(dialect))
    client = Client(served.config, num_events=30)
    tokens_per_event = served.config.tokens_per_event
    served.ask(client.request(client.candidates(9), length=24))
    usage = served.ask(client.request(client.candidates(9)))
    assert usage.history_tokens == 24 * tokens_per_event
    assert usage.cached_tokens == 0
    assert usage.reuse_blocked == ReuseBlocked.WINDOW_SHIFTED


@keeps_kv
def test_a_window_that_begins_at_anchors_is_reused_until_the_next_one(
    dialect: str, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config(dialect, anchor_stride=8))
    client = Client(served.config, num_events=36)
    tokens_per_event = served.config.tokens_per_event
    seen = []
    for length in (24, 25, 28, 32, 33):
        usage = served.ask(client.request(client.candidates(9), length=length))
        seen.append((usage.history_tokens // tokens_per_event, usage.cached_tokens))
        missed = length in (25, 33)
        assert usage.reuse_blocked == (ReuseBlocked.WINDOW_SHIFTED if missed else None)
    # From 25 events on the window begins with event 8, from 33 on with event 16.
    last = -1 if dialect == "research" else 0
    again = [(17 * tokens_per_event + last) // 4 * 4, (20 * tokens_per_event + last) // 4 * 4]
    assert seen == [(24, 0), (17, 0), (20, again[0]), (24, again[1]), (17, 0)]


@keeps_kv
def test_a_client_that_sends_the_window_alone_reuses_what_the_whole_history_left(
    dialect: str, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config(dialect, anchor_stride=8))
    client = Client(served.config, num_events=32)
    candidates = client.candidates(9)
    served.ask(client.request(candidates))
    whole = served.ask(client.request(candidates))
    # The window begins with event 8, whatever of the events before it is sent.
    for start_index in (8, 3):
        usage = served.ask(client.request(candidates, start_index=start_index))
        assert usage.history_tokens == whole.history_tokens
        assert usage.cached_tokens == whole.cached_tokens > 0


@keeps_kv
@pytest.mark.parametrize(("start_index", "length"), [(11, 32), (2, 20)])
def test_a_client_that_cut_its_history_above_the_anchor_is_told_so_and_read_as_sent(
    dialect: str, start_index: int, length: int, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config(dialect, anchor_stride=8))
    client = Client(served.config, num_events=length)
    candidates = client.candidates(9)
    served.ask(client.request(candidates, length=length - 2))
    usage = served.ask(client.request(candidates, start_index=start_index))
    assert usage.history_tokens == (length - start_index) * served.config.tokens_per_event
    assert usage.cached_tokens == 0
    assert usage.reuse_blocked == ReuseBlocked.WINDOW_SHIFTED


@keeps_kv
def test_events_before_the_window_are_not_read(dialect: str, tmp_path: Path) -> None:
    served = serve(tmp_path, toy_config(dialect, anchor_stride=8))
    client = Client(served.config, num_events=32)
    served.ask(client.request(client.candidates(9)))
    retried = served.ask(client.request(client.candidates(9)))
    client.change("item_ids", 7)
    before = served.ask(client.request(client.candidates(9)))
    assert before.cached_tokens == retried.cached_tokens > 0
    client.change("item_ids", 8)
    assert served.ask(client.request(client.candidates(9))).cached_tokens == 0


@keeps_kv
def test_a_history_cut_to_its_oldest_events_stays_reusable_for_ever(
    dialect: str, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config(dialect, truncation="oldest"))
    client = Client(served.config, num_events=60)
    served.ask(client.request(client.candidates(9), length=24))
    usage = served.ask(client.request(client.candidates(9)))
    tokens = 24 * served.config.tokens_per_event
    assert usage.history_tokens == tokens
    # The retrieval models compute their last row anew.
    assert usage.cached_tokens == tokens - (0 if dialect == "nvidia" else 4)


@every_dialect
@pytest.mark.parametrize("truncation", ["newest", "oldest"])
@pytest.mark.parametrize("start_index", [0, 5, 29])
def test_long_histories_are_read_as_the_config_says(
    dialect: str, truncation: str, start_index: int, tmp_path: Path
) -> None:
    served = serve(tmp_path, toy_config(dialect, truncation=truncation, anchor_stride=5))
    client = Client(served.config, start_index, num_events=40)
    later = client.events["timestamps"][-1] + 600
    for length in (31, 38, 40):
        usage = served.ask(
            client.request(
                client.candidates(9), length=length, start_index=start_index, request_time=later
            )
        )
        assert usage.candidates == 9
