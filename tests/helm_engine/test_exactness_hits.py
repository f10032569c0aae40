"""Which requests meet cached KV: those whose tokens are the same to the model, up to the block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helm_engine.request import ReuseBlocked
from tests.helm_engine.clients import START, Client
from tests.helm_engine.served import Served, serve
from tests.toy_models import toy_config

BLOCK = 4
NUM_EVENTS = 20
CONTEXTUAL = [{"name": "user_id", "num_rows": 5000}, {"name": "device", "num_rows": 4}]

# With contextual features that always count; `nvidia` reuses KV behind them in one layer only.
CHANGES: dict[str, dict[str, Any]] = {
    "research": {},
    "stu": {"contextual": CONTEXTUAL},
    "nvidia": {"contextual": CONTEXTUAL, "num_layers": 1},
    "sasrec": {},
}
READ = {
    "research": ["item_ids", "timestamps"],
    "stu": ["item_ids", "timestamps", "actions", "category"],
    "nvidia": ["item_ids", "actions"],
    "sasrec": ["item_ids"],
}
NOT_READ = {"research": ["actions"], "nvidia": ["timestamps"], "sasrec": ["timestamps", "actions"]}
# Full blocks of the tokens that a retry finds: `research` and `sasrec` compute the last one anew.
RETRIED = {"research": 16, "stu": 20, "nvidia": 40, "sasrec": 16}

every_dialect = pytest.mark.parametrize("dialect", CHANGES)


def cases(fields: dict[str, list[str]]) -> pytest.MarkDecorator:
    """Each field of each dialect."""
    return pytest.mark.parametrize(
        ("dialect", "field"), [(dialect, one) for dialect in fields for one in fields[dialect]]
    )


def first_visit(
    directory: Path, dialect: str, num_candidates: int = 9, **changes: Any
) -> tuple[Served, Client]:
    """A served model that has answered a client once, and again from its cache."""
    served = serve(directory, toy_config(dialect, **(CHANGES[dialect] | changes)))
    client = Client(served.config, num_events=NUM_EVENTS)
    # In `stu`, each event has a time bucket of its own.
    client.events["timestamps"] = [
        START - 60 * (NUM_EVENTS + 1 - place) ** 2 for place in range(NUM_EVENTS)
    ]
    for cached in (0, RETRIED[dialect]):
        assert ask(served, client, num_candidates) == cached
    return served, client


def ask(served: Served, client: Client, num_candidates: int = 9, **fields: Any) -> int:
    """Asks at one and the same time; returns the cached tokens, whose scores were exact."""
    body = client.request(client.candidates(num_candidates), request_time=START)
    return served.ask({**body, **fields}).cached_tokens


def first_token_that_reads(dialect: str, field: str, place: int) -> int:
    """The token that changes with a value of an event."""
    token = len(CHANGES[dialect].get("contextual", [])) + place
    if dialect == "nvidia":
        return token + place + (field == "actions")
    if dialect == "research" and field == "timestamps" and place:
        return token - 1  # The event before reads this one's time.
    return token


@cases(READ)
@pytest.mark.parametrize("place", [0, 1, 5, 8, 13, 19])
def test_an_edited_event_hits_up_to_its_block_alone(
    dialect: str, field: str, place: int, tmp_path: Path
) -> None:
    served, client = first_visit(tmp_path, dialect)
    client.change(field, place)
    token = first_token_that_reads(dialect, field, place)
    assert ask(served, client) == min(RETRIED[dialect], token // BLOCK * BLOCK)


@cases(NOT_READ)
def test_what_the_model_does_not_read_changes_no_hit(
    dialect: str, field: str, tmp_path: Path
) -> None:
    served, client = first_visit(tmp_path, dialect)
    for place in range(NUM_EVENTS):
        client.change(field, place)
    client.events["mood"] = [1] * NUM_EVENTS
    assert ask(served, client) == RETRIED[dialect]


@pytest.mark.parametrize(
    ("dialect", "reused"), [("research", 8), ("stu", 0), ("nvidia", 20), ("sasrec", 8)]
)
def test_an_event_inserted_late_never_hits_behind_it(
    dialect: str, reused: int, tmp_path: Path
) -> None:
    served, client = first_visit(tmp_path, dialect)
    client.insert_late(9)
    assert ask(served, client) == reused


@every_dialect
def test_another_user_never_hits(dialect: str, tmp_path: Path) -> None:
    served, client = first_visit(tmp_path, dialect)
    assert ask(served, client, user="bob") == 0
    assert ask(served, client, user=None) == 0


@pytest.mark.parametrize("dialect", ["stu", "nvidia"])
@pytest.mark.parametrize("name", ["user_id", "device"])
def test_another_context_never_hits(dialect: str, name: str, tmp_path: Path) -> None:
    served, client = first_visit(tmp_path, dialect)
    client.change_context(name)
    assert ask(served, client) == 0


@pytest.mark.parametrize(
    ("dialect", "reused"), [("research", 16), ("stu", 0), ("nvidia", 40), ("sasrec", 16)]
)
def test_a_later_request_hits_where_no_final_token_reads_its_time(
    dialect: str, reused: int, tmp_path: Path
) -> None:
    served, client = first_visit(tmp_path, dialect)
    assert ask(served, client, request_time=START + 3600) == reused


# ---------------------------------------------------------------- `stu`


def test_further_candidates_hit_at_the_same_time(tmp_path: Path) -> None:
    served, client = first_visit(tmp_path, "stu")
    for number in (1, 9, 50):
        assert ask(served, client, number) == 20


def test_a_longer_history_never_hits_and_the_answer_names_the_model(tmp_path: Path) -> None:
    served, client = first_visit(tmp_path, "stu")
    client.insert(NUM_EVENTS, START)
    usage = served.ask(client.request(client.candidates(9), request_time=START))
    assert usage.cached_tokens == 0
    assert usage.reuse_blocked == ReuseBlocked.MODEL


def test_a_time_in_the_same_bucket_hits(tmp_path: Path) -> None:
    served, client = first_visit(tmp_path, "stu")
    # The buckets of these events are 441 and more minutes wide at their beginning.
    client.events["timestamps"][:4] = [time - 1 for time in client.events["timestamps"][:4]]
    assert ask(served, client) == 20


NEEDS_50 = [
    {"name": "user_id", "num_rows": 5000, "min_sequence_len": NUM_EVENTS + 50},
    {"name": "device", "num_rows": 4, "min_sequence_len": NUM_EVENTS + 30},
]


@pytest.mark.parametrize("fewest", [50, 30])
def test_as_many_candidates_as_make_a_feature_count_never_hit_those_before(
    fewest: int, tmp_path: Path
) -> None:
    served, client = first_visit(tmp_path, "stu", fewest, contextual=NEEDS_50)
    assert ask(served, client, fewest + 1) == 20
    assert ask(served, client, fewest - 1) == 0
    assert ask(served, client, fewest - 2) == 20
    assert ask(served, client, fewest) == 20


def test_a_feature_that_does_not_count_is_not_read(tmp_path: Path) -> None:
    served, client = first_visit(tmp_path, "stu", 9, contextual=NEEDS_50)
    client.change_context("user_id")
    client.change_context("device")
    assert ask(served, client) == 20
