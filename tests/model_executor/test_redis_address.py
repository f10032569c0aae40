"""URLs of parameter servers: what they say, what is refused, and that no password shows."""

from __future__ import annotations

import pytest

from model_executor.redis_address import RedisAddress, parse_redis_url


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://rows", RedisAddress("rows", 6379)),
        ("redis://127.0.0.1:7000", RedisAddress("127.0.0.1", 7000)),
        ("redis://127.0.0.1:7000/", RedisAddress("127.0.0.1", 7000)),
        ("redis://[::1]:7000/3", RedisAddress("::1", 7000, 3)),
        ("redis://:secret@rows/1", RedisAddress("rows", 6379, 1, None, "secret")),
        ("redis://ada:p%40ss%2Fword@rows:1/1", RedisAddress("rows", 1, 1, "ada", "p@ss/word")),
    ],
)
def test_a_url_is_read(url: str, address: RedisAddress) -> None:
    assert parse_redis_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "rows:6379",
        "http://ada:secret@rows",
        "rediss://ada:secret@rows",
        "redis://",
        "redis:///0",
        "redis://ada:secret@rows:port",
        "redis://ada:secret@rows:70000",
        "redis://ada:secret@rows/first",
        "redis://ada:secret@rows/-1",
        "redis://ada:secret@rows/²",
        "redis://ada:secret@rows/0?timeout=3",
        "redis://ada:secret@[rows",
    ],
)
def test_what_is_no_such_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"redis://\[user:password@\]host:port/db") as refusal:
        parse_redis_url(url)
    assert "secret" not in str(refusal.value)


def test_an_address_is_shown_without_its_password() -> None:
    address = parse_redis_url("redis://ada:secret@[::1]:7000/3")
    assert str(address) == "[::1]:7000/3"
    assert "secret" not in repr(address)
