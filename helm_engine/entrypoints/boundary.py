"""`helm-engine boundary`: looks at the split of a running server's pool, and moves it."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import typer

from helm_engine.entrypoints.command import CommandError

EXAMPLES = """
\b
Examples:
  export HELM_ADMIN_KEY=KEY
  helm-engine boundary http://127.0.0.1:8000
  helm-engine boundary http://127.0.0.1:8000 --emb-fraction 0.4 --wait 10
"""

_ANSWER_SECONDS = 10.0
_POLL_SECONDS = 0.1


def boundary(
    server: Annotated[str, typer.Argument(metavar="URL", help="Address of the server.")],
    emb_fraction: Annotated[
        float | None,
        typer.Option(metavar="SHARE", min=0.0, max=1.0, help="The split to ask for, 0 to 1."),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0.0, help="Wait so long for all pages to have moved."),
    ] = 0.0,
    admin_key: Annotated[
        str, typer.Option(metavar="KEY", envvar="HELM_ADMIN_KEY", help="The server's admin key.")
    ] = "",
) -> None:
    """Show or move the boundary between embedding rows and KV of a running server.

    A server that runs with --controller moves it itself and refuses.
    """
    if urlsplit(server).scheme not in ("http", "https"):
        raise CommandError(f"URL: {server!r} is not an http address")
    address = f"{server.rstrip('/')}/v1/admin/boundary"
    body = None if emb_fraction is None else {"emb_fraction": emb_fraction}
    ends = time.monotonic() + wait
    state = _ask(address, admin_key, body)
    while state["lag_pages"] and time.monotonic() < ends:
        time.sleep(_POLL_SECONDS)
        state = _ask(address, admin_key, None)
    print(
        f"target {state['target']:.3f}, committed {state['committed']:.3f}, "
        f"lag {state['lag_pages']} pages"
    )
    if wait and state["lag_pages"]:
        raise CommandError(f"{abs(state['lag_pages'])} pages have not moved within {wait:g} s")


def _ask(address: str, admin_key: str, body: dict[str, float] | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    if admin_key:
        headers["Authorization"] = f"Bearer {admin_key}"
    data = None if body is None else json.dumps(body).encode()
    request = Request(address, data, headers, method="GET" if body is None else "PUT")
    try:
        with urlopen(request, timeout=_ANSWER_SECONDS) as answer:
            return dict(json.load(answer))
    except HTTPError as error:
        raise CommandError(f"the server refused: {_message(error)}") from error
    except (URLError, OSError, ValueError) as error:
        raise CommandError(f"{address}: {getattr(error, 'reason', error)}") from error


def _message(error: HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.code}"
