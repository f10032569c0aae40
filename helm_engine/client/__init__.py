"""Asks a running server over HTTP, from threads (`Client`) or from coroutines (`AsyncClient`).

Needs the extra `client`; nothing of the engine, and no torch, is loaded.
"""

from __future__ import annotations

try:
    import httpx as _httpx  # noqa: F401  (both are imported here for a clear word where one lacks)
    import msgspec as _msgspec  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"helm_engine.client needs {error.name}, which comes with the extra `client`: "
        "pip install 'helm-engine[client]'"
    ) from error

from helm_engine.client.answers import ForgottenUser, ServedModel
from helm_engine.client.async_client import AsyncClient
from helm_engine.client.errors import InvalidAnswerError, ServerConnectionError, ServerTimeoutError
from helm_engine.client.params import RecommendParams
from helm_engine.client.sync_client import Client
from helm_engine.exceptions import HelmError
from helm_engine.protocol import Candidates, History, Recommendation, RecommendRequest

__all__ = [
    "AsyncClient",
    "Candidates",
    "Client",
    "ForgottenUser",
    "HelmError",
    "History",
    "InvalidAnswerError",
    "RecommendParams",
    "RecommendRequest",
    "Recommendation",
    "ServedModel",
    "ServerConnectionError",
    "ServerTimeoutError",
]
