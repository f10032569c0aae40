"""Where a parameter server is: `redis://[user:password@]host:port/db`."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

_DEFAULT_PORT = 6379
_FORM = "redis://[user:password@]host:port/db"


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A Redis database; as text it is `host:port/db`, and its password is never shown."""

    host: str
    port: int
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}/{self.db}"


def parse_redis_url(url: str) -> RedisAddress:
    """Reads a URL; user and password may be percent-encoded.

    Raises:
        ValueError: it is of another form. The message does not quote it, for it may hold a
            password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"its host or its port cannot be read ({_FORM})") from None
    if parts.scheme != "redis" or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"must be of the form {_FORM}")
    db = parts.path.removeprefix("/") or "0"
    if not (db.isascii() and db.isdigit()):
        raise ValueError(f"the database must be a number ({_FORM})")
    return RedisAddress(
        host=parts.hostname,
        port=_DEFAULT_PORT if port is None else port,
        db=int(db),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
    )
