"""The server under load: what its `/info` says of the model and its limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from helm_engine.config import RequestLimits
from model_executor.exceptions import ModelDirectoryError
from model_executor.model_config import ModelConfig, parse_model_config

_INFO_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answered."""

    address: str
    """Base address, without a slash at its end."""
    version: str
    model_name: str
    model: ModelConfig
    limits: RequestLimits


def headers(api_key: str | None) -> dict[str, str]:
    """Headers of every request to a server."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


async def find_target(url: str, api_key: str | None) -> Target:
    """Asks a server what it serves.

    Raises:
        ValueError: the address is none, nobody answers there, or the answer is not a HELM Engine's.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{url}: is not an address such as http://127.0.0.1:8000")
    address = url.rstrip("/")
    timeout = aiohttp.ClientTimeout(total=_INFO_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(headers=headers(api_key), timeout=timeout) as session,
            session.get(f"{address}/info") as response,
        ):
            status, raw = response.status, await response.read()
    except TimeoutError as error:
        raise ValueError(f"{address}: no answer within {_INFO_TIMEOUT_S:g} s") from error
    except (aiohttp.ClientError, ValueError) as error:
        raise ValueError(f"{address}: cannot be reached: {error}") from error
    if status != 200:
        raise ValueError(f"{address}/info: {said(status, raw)}")
    return _parse(address, raw)


def _parse(address: str, raw: bytes) -> Target:
    source = f"{address}/info"
    try:
        info = json.loads(raw)
        return Target(
            address=address,
            version=info["version"],
            model_name=info["model"],
            model=parse_model_config(info["model_config"], source),
            limits=RequestLimits(**info["limits"]),
        )
    except ModelDirectoryError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: is not that of a HELM Engine of this version") from error


def said(status: int, raw: bytes) -> str:
    """An answer that is no success: its status, and the message where it has OpenAI's form."""
    try:
        body: Any = json.loads(raw)
        return f"{status}: {body['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return str(status)
