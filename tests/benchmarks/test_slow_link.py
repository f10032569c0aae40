"""The link of the benchmarks: bytes pass whole and in order, never sooner than stated."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.redis_server import running_redis
from benchmarks.slow_link import SlowLink, slow_link
from model_executor.exceptions import RowsUnavailableError
from model_executor.redis_address import RedisAddress
from model_executor.redis_layout import PublishedTables
from model_executor.redis_publish import publish_tables
from model_executor.redis_store import RedisTables

PATIENCE_S = 60


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that sends back what it gets, and closes when its client has."""
    server = socket.create_server(("127.0.0.1", 0))

    def echo(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def connected(link: SlowLink) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), timeout=PATIENCE_S)


def exchange(connection: socket.socket, data: bytes) -> tuple[bytes, float]:
    """Sends, ends, and reads until the other end has ended too; with the seconds it took."""
    begun = time.monotonic()

    def send() -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    answer = b"".join(iter(lambda: connection.recv(65536), b""))
    sender.join()
    return answer, time.monotonic() - begun


def test_bytes_pass_whole_and_in_order(echo_port: int) -> None:
    data = np.random.default_rng(0).bytes(1_000_000)
    with slow_link(echo_port) as link, connected(link) as connection:
        assert exchange(connection, data)[0] == data


@pytest.mark.parametrize("round_trip_ms", [5.0, 60.0])
def test_an_answer_takes_a_round_trip_at_least(echo_port: int, round_trip_ms: float) -> None:
    with slow_link(echo_port, round_trip_ms) as link, connected(link) as connection:
        for _ in range(3):
            begun = time.monotonic()
            connection.sendall(b"?")
            assert connection.recv(1) == b"?"
            assert time.monotonic() - begun >= round_trip_ms / 1e3


def test_connections_share_the_bandwidth_of_each_way(echo_port: int) -> None:
    with slow_link(echo_port, 0.0, 1e6) as link:
        answers: list[tuple[bytes, float]] = []

        def ask() -> None:
            with connected(link) as connection:
                answers.append(exchange(connection, bytes(100_000)))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # 300,000 bytes at a million a second, however the connections took turns.
        assert time.monotonic() - begun >= 0.3
    assert [len(answer) for answer, _ in answers] == [100_000] * 3


def test_a_cut_link_is_silent_and_goes_on_once_restored(echo_port: int) -> None:
    with slow_link(echo_port) as link, connected(link) as old:
        link.cut()
        with connected(link) as new:
            for connection in (old, new):
                connection.sendall(b"held")
                connection.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
                connection.settimeout(PATIENCE_S)
            link.restore()
            for connection in (old, new):
                assert connection.recv(4, socket.MSG_WAITALL) == b"held"


def test_the_end_of_the_server_is_passed_on(echo_port: int) -> None:
    with slow_link(echo_port) as link, connected(link) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    with slow_link(1) as nowhere, connected(nowhere) as connection:
        assert connection.recv(1) == b""


def test_rows_through_a_slow_link_that_is_cut_and_restored() -> None:
    table = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
    tables = PublishedTables(1, "ab" * 32, "float32", 32, {"items": 500})
    now = [0.0]
    with running_redis() as server:
        publish_tables(
            RedisAddress("127.0.0.1", server.port),
            tables,
            [table],
            PATIENCE_S,
            lambda *_: lambda rows: None,
        )
        with slow_link(server.port, 2.0, 1e7) as link:
            address = RedisAddress("127.0.0.1", link.port)
            store = RedisTables(address, tables, 1.0, lambda: now[0])
            wanted = np.arange(0, 500, 3)
            np.testing.assert_array_equal(store.read_rows(wanted), table[wanted])
            link.cut()
            for _ in range(2):
                now[0] += 10.0
                with pytest.raises(RowsUnavailableError, match=r"did not answer within 1 s"):
                    store.read_rows(wanted)
            link.restore()
            now[0] += 10.0
            np.testing.assert_array_equal(store.read_rows(wanted), table[wanted])
            store.close()
