"""What a client can ask, as steps that the sync and the async client carry out alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from helm_engine.client.answers import (
    ForgottenUser,
    ServedModel,
    read_forgotten,
    read_models,
    read_object,
    read_recommendation,
    read_recommendations,
)
from helm_engine.client.body import RequestBody
from helm_engine.client.errors import ServerConnectionError
from helm_engine.client.exchange import Call, exchange
from helm_engine.client.messages import Answer, Steps
from helm_engine.client.options import ClientOptions, is_header_value
from helm_engine.exceptions import EngineUnavailableError, HelmError, InvalidRequestError
from helm_engine.protocol import Recommendation, RecommendRequest

T = TypeVar("T")

_RECOMMEND = "/v1/recommend"


class Session:
    """The calls of one client; holds no state between them."""

    def __init__(self, options: ClientOptions) -> None:
        self._options = options

    def recommend(
        self, request: Mapping[str, object], request_id: str | None
    ) -> Steps[Recommendation]:
        """One request."""
        if request_id is not None and not is_header_value(request_id):
            raise InvalidRequestError(
                f"request_id: must be printable ASCII without spaces, not {request_id!r}",
                "request_id",
            )
        return self._post([request], False, read_recommendation, request_id)

    def recommend_many(
        self, requests: Sequence[RecommendRequest | Mapping[str, object]]
    ) -> Steps[list[Recommendation | HelmError]]:
        """Several requests in one body."""
        read = functools.partial(read_recommendations, number=len(requests))
        return self._post(requests, True, read)

    def models(self) -> Steps[list[ServedModel]]:
        """What is served."""
        return self._ask("GET", "/v1/models", read_models)

    def info(self) -> Steps[dict[str, Any]]:
        """Configuration and limits."""
        return self._ask("GET", "/info", read_object)

    def health(self) -> Steps[bool]:
        """Whether requests can be answered; asked once, because no is an answer."""

        def healthy(_: Answer) -> bool:
            return True

        try:
            return (yield from self._ask("GET", "/health", healthy, is_retried=False))
        except (EngineUnavailableError, ServerConnectionError):
            return False

    def forget(self, user: str) -> Steps[ForgottenUser]:
        """Drops what is kept of a user."""
        if not user:
            raise InvalidRequestError("user: must not be empty", "user")
        try:
            path = f"/v1/users/{quote(user, safe='')}:forget"
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"user: cannot be sent: {error}", "user") from error
        return self._ask("POST", path, read_forgotten)

    def _ask(
        self, method: str, path: str, read: Callable[[Answer], T], is_retried: bool = True
    ) -> Steps[T]:
        started = self._options.clock.now()
        return exchange(Call(method, path, read, started, is_retried=is_retried), self._options)

    def _post(
        self,
        requests: Sequence[RecommendRequest | Mapping[str, object]],
        is_list: bool,
        read: Callable[[Answer], T],
        request_id: str | None = None,
    ) -> Steps[T]:
        started = self._options.clock.now()
        body = RequestBody(requests, is_list, self._options.encoding)
        return exchange(Call("POST", _RECOMMEND, read, started, body, request_id), self._options)
