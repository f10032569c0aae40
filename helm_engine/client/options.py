"""What a client is set up with."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from helm_engine.client.encoding import MEDIA_TYPES, Encoding
from helm_engine.clock import Clock, SystemClock
from helm_engine.version import __version__

API_KEY_VARIABLE = "HELM_API_KEY"
DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_SECONDS = 30.0
DEFAULT_MAX_RETRIES = 2


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Checked when made.

    Raises:
        ValueError: names the option.
    """

    base_url: str = DEFAULT_BASE_URL
    """The server's root, without `/v1`."""
    api_key: str | None = field(default=None, repr=False)
    """None = that of the environment, if there is one."""
    timeout: float = DEFAULT_TIMEOUT_SECONDS
    """Seconds of one attempt, up to the whole answer."""
    max_retries: int = DEFAULT_MAX_RETRIES
    """Of a call without a deadline; 0 turns retries off for all calls."""
    encoding: Encoding = "json"
    clock: Clock = field(default_factory=SystemClock)
    jitter: Callable[[], float] = random.random
    """Random numbers in [0, 1)."""

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.base_url)
        except (httpx.InvalidURL, TypeError) as error:
            raise ValueError(f"base_url: {self.base_url!r} is no URL: {error}") from error
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise ValueError(
                f"base_url: must be http:// or https://, a host and no query, not {self.base_url!r}"
            )
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout: must be a positive number of seconds, not {self.timeout}")
        if self.max_retries < 0:
            raise ValueError(f"max_retries: must not be negative, not {self.max_retries}")
        if self.encoding not in MEDIA_TYPES:
            names = " or ".join(MEDIA_TYPES)
            raise ValueError(f"encoding: must be {names}, not {self.encoding!r}")
        if self.api_key is None:
            object.__setattr__(self, "api_key", os.environ.get(API_KEY_VARIABLE) or None)
        if self.api_key is not None and not is_header_value(self.api_key):
            raise ValueError("api_key: must be printable ASCII without spaces")

    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        headers = {
            "Accept": MEDIA_TYPES[self.encoding],
            "User-Agent": f"helm-engine-client/{__version__}",
        }
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


def is_header_value(text: str) -> bool:
    """Whether a text can stand in a header as one word."""
    return text.isascii() and text.isprintable() and text != "" and " " not in text
