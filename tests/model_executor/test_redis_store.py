"""Rows through a real Redis: they are the file's, and what can go wrong is said by name.

The server is killed, frozen, emptied and brought back. What is read is held against the arrays that
were published.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.redis_server import RedisServer, running_redis
from model_executor.exceptions import RowsUnavailableError, TablesMismatchError
from model_executor.redis_address import parse_redis_url
from model_executor.redis_layout import PUBLISHED_KEY, PublishedTables, rows_key
from model_executor.redis_publish import PublishError, publish_tables
from model_executor.redis_store import RedisTables

WIDTH = 6
SIZES = {"items": 5000, "users": 1, "kinds": 70}
VERSION = "ab" * 32
TABLES = PublishedTables(1, VERSION, "float32", 4 * WIDTH, SIZES)
ARRAYS = [
    np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)
    for seed, rows in enumerate(SIZES.values())
]
ALL_ROWS = np.concatenate(ARRAYS)
TIMEOUT_S = 20.0
"""For servers that answer: long, so that a busy machine raises no false alarm."""
SHORT_S = 0.2
"""For servers that do not."""


def publish(server: RedisServer, tables: PublishedTables = TABLES) -> list[tuple[str, int]]:
    """Publishes; returns the steps of its progress."""
    seen: list[tuple[str, int]] = []

    def watch(name: str, rows: int) -> Callable[[int], None]:
        return lambda number: seen.append((name, number))

    publish_tables(parse_redis_url(server.url), tables, ARRAYS, TIMEOUT_S, watch)
    return seen


@contextmanager
def opened(
    server: RedisServer, tables: PublishedTables = TABLES, timeout_s: float = TIMEOUT_S, **more: Any
) -> Iterator[RedisTables]:
    store = RedisTables(parse_redis_url(server.url), tables, timeout_s, **more)
    try:
        yield store
    finally:
        store.close()


def ids(*row_ids: int) -> npt.NDArray[np.int64]:
    return np.array(row_ids, dtype=np.int64)


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    """A server that no test stops or spoils."""
    with running_redis() as server:
        publish(server)
        yield server


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server for one test to do with as it likes."""
    with running_redis() as server:
        publish(server)
        yield server


# ---------------------------------------------------------------- what is read


@settings(max_examples=50)
@given(wanted=st.lists(st.integers(0, len(ALL_ROWS) - 1), max_size=200))
def test_rows_are_the_published_ones_in_the_order_asked_for(
    shared: RedisServer, wanted: list[int]
) -> None:
    with opened(shared) as store:
        rows = store.read_rows(ids(*wanted))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, ALL_ROWS[ids(*wanted)])


@pytest.mark.parametrize("number", [2047, 2048, 2049, 40_000])
def test_batches_beyond_one_command_and_one_exchange(shared: RedisServer, number: int) -> None:
    wanted = np.random.default_rng(number).integers(0, len(ALL_ROWS), number)
    with opened(shared) as store:
        np.testing.assert_array_equal(store.read_rows(wanted), ALL_ROWS[wanted])


def test_the_store_knows_how_many_rows_there_are(shared: RedisServer) -> None:
    with opened(shared) as store:
        assert store.num_rows == 5071
        with pytest.raises(IndexError, match="row 5071"):
            store.read_rows(ids(0, 5071))


def test_threads_read_at_once_and_each_gets_its_own_rows(shared: RedisServer) -> None:
    wrong: list[int] = []
    with opened(shared) as store:

        def read(seed: int) -> None:
            generator = np.random.default_rng(seed)
            for _ in range(30):
                wanted = generator.integers(0, len(ALL_ROWS), 50)
                if not np.array_equal(store.read_rows(wanted), ALL_ROWS[wanted]):
                    wrong.append(seed)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_row_that_is_replaced_is_read_anew(server: RedisServer) -> None:
    new = np.arange(WIDTH, dtype="<f4")
    with opened(server) as store, server.client() as client:
        client.hset(rows_key(VERSION, "items"), (17).to_bytes(4, "little"), new.tobytes())
        rows = store.read_rows(ids(16, 17))
    np.testing.assert_array_equal(rows, [ALL_ROWS[16], new])


# ---------------------------------------------------------------- publishing


def test_publishing_tells_how_far_it_is_and_may_be_repeated(server: RedisServer) -> None:
    with server.client() as client:
        client.hdel(rows_key(VERSION, "items"), (17).to_bytes(4, "little"))
    for _ in range(2):
        done = publish(server)
        for name, rows in SIZES.items():
            assert sum(number for table, number in done if table == name) == rows
    with opened(server) as store:
        np.testing.assert_array_equal(store.read_rows(np.arange(5071)), ALL_ROWS)


def test_tables_published_in_part_are_not_served(server: RedisServer) -> None:
    half = msgspec.structs.replace(TABLES, version="cd" * 32)

    def give_up(name: str, rows: int) -> Callable[[int], None]:
        if name == "kinds":
            raise KeyboardInterrupt
        return lambda number: None

    with pytest.raises(KeyboardInterrupt):
        publish_tables(parse_redis_url(server.url), half, ARRAYS, TIMEOUT_S, give_up)
    with pytest.raises(TablesMismatchError, match=r"^version: .* cdcdcdcdcdcd \(.* abababababab\)"):
        opened(server, half).__enter__()


def test_a_new_version_lies_beside_the_old_one(server: RedisServer) -> None:
    new = msgspec.structs.replace(TABLES, version="ef" * 32)
    arrays = [-array for array in ARRAYS]
    publish_tables(
        parse_redis_url(server.url), new, arrays, TIMEOUT_S, lambda *_: lambda number: None
    )
    with opened(server) as old_store, opened(server, new) as new_store:
        np.testing.assert_array_equal(old_store.read_rows(ids(1, 5001)), ALL_ROWS[[1, 5001]])
        np.testing.assert_array_equal(new_store.read_rows(ids(1, 5001)), -ALL_ROWS[[1, 5001]])


def test_publishing_to_a_server_without_memory_or_none_at_all_fails_by_name(
    server: RedisServer,
) -> None:
    with server.client() as client:
        client.config_set("maxmemory", "1mb")
    with pytest.raises(PublishError, match=rf"parameter server at 127.0.0.1:{server.port}/0.*memo"):
        publish(server)
    server.kill()
    with pytest.raises(PublishError, match=rf"127.0.0.1:{server.port}/0.*refused"):
        publish(server)


def test_publishing_to_a_frozen_server_ends(server: RedisServer) -> None:
    server.freeze()
    with pytest.raises(PublishError, match=r"did not answer within 0\.2 s"):
        publish_tables(
            parse_redis_url(server.url), TABLES, ARRAYS, SHORT_S, lambda *_: lambda number: None
        )


# ---------------------------------------------------------------- what does not fit the model


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layout", 2),
        ("version", "cd" * 32),
        ("dtype", "float16"),
        ("row_bytes", 28),
        ("num_rows", {**SIZES, "kinds": 71}),
    ],
)
def test_other_tables_than_the_models_are_refused_by_field(
    server: RedisServer, field: str, value: object
) -> None:
    said = msgspec.structs.replace(TABLES, **{field: value})
    with server.client() as client:
        client.hset(PUBLISHED_KEY, VERSION, msgspec.json.encode(said))
    with pytest.raises(TablesMismatchError, match=f"^{field}: "):
        opened(server).__enter__()


@pytest.mark.parametrize("text", [b"", b"{}", b'{"layout": "1"}', b"\x80\x04K\x01."])
def test_a_damaged_description_is_refused(server: RedisServer, text: bytes) -> None:
    with server.client() as client:
        client.hset(PUBLISHED_KEY, VERSION, text)
    with pytest.raises(TablesMismatchError, match=PUBLISHED_KEY):
        opened(server).__enter__()


def test_a_table_that_lost_rows_is_refused_at_the_start(server: RedisServer) -> None:
    with server.client() as client:
        client.hdel(rows_key(VERSION, "kinds"), (3).to_bytes(4, "little"))
    with pytest.raises(TablesMismatchError, match=r"num_rows: .*kinds.* holds 69 rows.* 70"):
        opened(server).__enter__()


# ---------------------------------------------------------------- rows that cannot be had


def test_missing_rows_are_named_with_key_and_count(server: RedisServer) -> None:
    key = rows_key(VERSION, "items")
    with opened(server) as store:
        with server.client() as client:
            client.hdel(key, *[number.to_bytes(4, "little") for number in (3, 7)])
        with pytest.raises(RowsUnavailableError, match=rf"2 of 4 rows .* {key} .* \(row 7 first\)"):
            store.read_rows(ids(1, 7, 3, 4))
        np.testing.assert_array_equal(store.read_rows(ids(1, 4)), ALL_ROWS[[1, 4]])


@pytest.mark.parametrize("value", [b"", b"x" * 23, b"x" * 25])
def test_rows_of_another_length_are_refused(server: RedisServer, value: bytes) -> None:
    with opened(server) as store:
        with server.client() as client:
            # Together two broken rows may be as long as two sound ones.
            client.hset(rows_key(VERSION, "items"), (3).to_bytes(4, "little"), value)
            other = b"x" * (48 - len(value))
            client.hset(rows_key(VERSION, "items"), (4).to_bytes(4, "little"), other)
        with pytest.raises(RowsUnavailableError, match="not all of 24 bytes"):
            store.read_rows(ids(3, 4))


def test_a_server_that_is_killed_fails_reads_and_serves_them_once_it_is_back(
    server: RedisServer,
) -> None:
    now = [0.0]
    with opened(server, clock=lambda: now[0]) as store:
        for _ in range(3):
            np.testing.assert_array_equal(store.read_rows(ids(5, 5070)), ALL_ROWS[[5, 5070]])
            server.kill()
            for _ in range(10):
                now[0] += 10.0
                with pytest.raises(
                    RowsUnavailableError,
                    match=rf"^the parameter server at 127.0.0.1:{server.port}/0 cannot be reached",
                ):
                    store.read_rows(ids(5))
            server.start()
            now[0] += 1.0  # No pause is longer.


def test_reads_do_not_ask_during_a_pause_and_the_pause_grows_to_a_second(
    server: RedisServer,
) -> None:
    now = [0.0]
    with opened(server, clock=lambda: now[0]) as store:
        server.kill()
        for pause in (0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
            with pytest.raises(RowsUnavailableError):
                store.read_rows(ids(5))
            server.start()
            now[0] += 0.99 * pause
            with pytest.raises(RowsUnavailableError, match="cannot be reached"):
                store.read_rows(ids(5))
            server.kill()
            now[0] += 0.02 * pause
        with pytest.raises(RowsUnavailableError):
            store.read_rows(ids(5))
        server.start()
        now[0] += 1.0
        np.testing.assert_array_equal(store.read_rows(ids(5)), ALL_ROWS[[5]])


def test_a_frozen_server_fails_reads_after_the_time_out(server: RedisServer) -> None:
    now = [0.0]
    with opened(server, timeout_s=SHORT_S, clock=lambda: now[0]) as store:
        server.freeze()
        for _ in range(2):  # Once on the old connection, once on a new one.
            now[0] += 10.0
            with pytest.raises(RowsUnavailableError, match=r"did not answer within 0\.2 s"):
                store.read_rows(ids(5))
        server.thaw()
    with opened(server) as store:
        np.testing.assert_array_equal(store.read_rows(ids(5)), ALL_ROWS[[5]])


def test_an_answer_that_comes_too_late_is_nobody_elses(server: RedisServer) -> None:
    now = [0.0]
    with opened(server, timeout_s=1.0, clock=lambda: now[0]) as store:
        server.freeze()
        with pytest.raises(RowsUnavailableError):
            store.read_rows(ids(5))
        server.thaw()
        now[0] += 1.0
        np.testing.assert_array_equal(store.read_rows(ids(6)), ALL_ROWS[[6]])


def test_a_server_that_lost_its_data_fails_reads_until_they_are_published(
    server: RedisServer,
) -> None:
    with opened(server) as store:
        with server.client() as client:
            client.flushall()
        with pytest.raises(RowsUnavailableError, match="1 of 1 rows are missing"):
            store.read_rows(ids(5))
        publish(server)
        np.testing.assert_array_equal(store.read_rows(ids(5)), ALL_ROWS[[5]])


def test_no_server_at_all_is_an_error_at_the_start(server: RedisServer) -> None:
    server.kill()
    with pytest.raises(RowsUnavailableError, match="cannot be reached"):
        opened(server).__enter__()


# ---------------------------------------------------------------- passwords


def test_a_password_is_needed_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    with running_redis(password="open sesame") as server:
        address = replace(parse_redis_url("redis://h:1"), host="127.0.0.1", port=server.port)
        for password in (None, "shut sesame"):
            with pytest.raises(RowsUnavailableError, match="refuses the user or the") as refusal:
                RedisTables(replace(address, password=password), TABLES, TIMEOUT_S)
            assert "sesame" not in str(refusal.value)
        right = replace(address, password="open sesame")
        publish_tables(right, TABLES, ARRAYS, TIMEOUT_S, lambda *_: lambda number: None)
        store = RedisTables(right, TABLES, TIMEOUT_S)
        np.testing.assert_array_equal(store.read_rows(ids(5)), ALL_ROWS[[5]])
        store.close()
    assert "sesame" not in caplog.text


def test_an_outage_is_logged_once_with_its_end(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    with opened(server, clock=lambda: now[0]) as store:
        server.kill()
        for _ in range(5):
            now[0] += 2.0
            with pytest.raises(RowsUnavailableError):
                store.read_rows(ids(5))
        server.start()
        now[0] += 2.0
        store.read_rows(ids(5))
        store.read_rows(ids(5))
    lost, back = [record.getMessage() for record in caplog.records]
    assert "cannot be reached" in lost
    assert "delivers rows again" in back
