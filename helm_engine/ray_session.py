"""A Ray to run on: one of our own that ends with this process, or one that is there already."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import ray

OBJECT_STORE_BYTES = 256 << 20
"""Of a Ray of our own: requests are small, and none stays."""


@contextmanager
def ray_session(address: str | None, num_cpus: int) -> Iterator[None]:
    """A Ray for as long as this lasts.

    Args:
        address: of one that is there already, `host:port` or `auto`; None = one of our own.
        num_cpus: cores that processes may ask for of our own; they need not be there.

    Raises:
        ConnectionError: there is none at the address.
    """
    if address is None:
        _start_ray(num_cpus)
    else:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    # It says in the log what the operator is told anyway.
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(num_cpus: int) -> None:
    """Starts a Ray of one node, which asks whoever reaches it for a token.

    Ray would write the token into the home directory. Unless the operator has said where it is, or
    that there is to be none, it is made here and known to the processes of this Ray alone. Ray
    itself turns authentication on then; a variable set now would come too late for that, and a
    token is read once, so that both stay for the life of this process.
    """
    if (
        not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
        and os.environ.get("RAY_AUTH_MODE") != "disabled"
    ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    ray.init(
        "local",
        num_cpus=num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
