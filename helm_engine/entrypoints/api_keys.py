"""Bearer API keys: who may ask, and who may administer."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from helm_engine.exceptions import AuthenticationError, PermissionDeniedError

OPEN_PATHS = frozenset(
    {"/health", "/ping", "/version", "/load", "/metrics", "/docs", "/openapi.json"}
)
"""For probes, load balancers and scrapers, which bring no key."""
ADMIN_PREFIX = "/v1/admin/"


def read_key_file(path: Path) -> list[str]:
    """Keys of a file, one a line; blank lines and those that begin with # are skipped.

    Raises:
        ValueError: the file cannot be read, or holds no key.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise ValueError(f"{path}: holds no key")
    return keys


class KeySet:
    """Keys, kept as digests, so that comparing takes the same time whatever is sent."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Takes the keys.

        Raises:
            ValueError: one is empty or cannot stand in a header.
        """
        for key in (kept := list(keys)):
            if not key or not key.isascii() or not key.isprintable() or key != key.strip():
                raise ValueError("key: must be printable ASCII without blanks around it")
        self._digests = [_digest(key.encode()) for key in kept]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def holds(self, key: bytes) -> bool:
        """Whether this is one of the keys; all are compared, whichever it is."""
        digest = _digest(key)
        return any([hmac.compare_digest(digest, known) for known in self._digests])


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """Keys of clients and of operators."""

    clients: KeySet = field(default_factory=lambda: KeySet([]))
    """Without any, everybody may ask."""
    admins: KeySet = field(default_factory=lambda: KeySet([]))
    """Without any, nobody may administer over HTTP. An admin's key serves a client too."""

    def check(self, path: str, authorization: bytes | None) -> None:
        """Whether a request may pass.

        Raises:
            AuthenticationError: it brings no key, or an unknown one.
            PermissionDeniedError: it is an admin's, and no admin key was set or sent.
        """
        scheme, _, key = (authorization or b"").partition(b" ")
        sent = key.strip() if scheme.lower() == b"bearer" else b""
        is_admin = self.admins.holds(sent)
        if path.startswith(ADMIN_PREFIX):
            if not self.admins:
                raise PermissionDeniedError("no admin key is set (--admin-key, HELM_ADMIN_KEY)")
            if not is_admin:
                kind = PermissionDeniedError if self.clients.holds(sent) else AuthenticationError
                raise kind("this needs the admin key: Authorization: Bearer KEY")
        elif path not in OPEN_PATHS and self.clients and not (self.clients.holds(sent) or is_admin):
            problem = "is unknown" if sent else "is missing: Authorization: Bearer KEY"
            raise AuthenticationError(f"the API key {problem}")
