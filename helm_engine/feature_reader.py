"""Reads the features that one model needs out of a request; names what is wrong with them."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic_core import PydanticCustomError

from helm_engine.exceptions import InvalidRequestError
from helm_engine.history_window import HistoryWindow
from helm_engine.int_array import to_int_array
from helm_engine.protocol import Candidates, History, RecommendRequest
from model_executor.inputs.features import Events, RequestFeatures
from model_executor.model_config import ModelConfig
from model_executor.step import Int64Array


class FeatureReader:
    """Checks arrays against a model's tables; the whole history is checked, read or not."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model

    def read(self, body: RecommendRequest, window: HistoryWindow) -> RequestFeatures:
        """Features of a request, its history cut to the window.

        Raises:
            InvalidRequestError: names the field and its limit.
        """
        history = self._events("history", body.history)
        times, asked_at = self._times(body.history, body.request_time)
        actions = self._actions(body.history)
        candidates = body.candidates
        nobody = Events(*(np.empty(0, dtype=np.int64),) * 3, history[1][:0])
        kept = slice(window.first, window.last)
        return RequestFeatures(
            history=Events(history[0][kept], times[kept], actions[kept], history[1][kept]),
            candidates=nobody if candidates is None else self._candidates(candidates),
            context=self._context(body.context),
            request_time=asked_at,
        )

    def _events(self, group: str, events: History | Candidates) -> tuple[Int64Array, Int64Array]:
        """Item ids [n] and item features [n, K]."""
        _check_lengths(group, events.lengths())
        item_ids = self._item_ids(f"{group}.item_ids", events.item_ids)
        extras = events.model_extra or {}
        features = np.empty((len(item_ids), len(self._model.item_features)), dtype=np.int64)
        for place, feature in enumerate(self._model.item_features):
            field = f"{group}.{feature.name}"
            if feature.name not in extras:
                raise InvalidRequestError(f"{field}: required, this model reads it", field)
            features[:, place] = _ids(field, extras[feature.name], feature.num_rows)
        return item_ids, features

    def _candidates(self, candidates: Candidates) -> Events:
        item_ids, features = self._events("candidates", candidates)
        nothing = np.zeros(len(item_ids), dtype=np.int64)
        return Events(item_ids, nothing, nothing, features)

    def _item_ids(self, field: str, item_ids: Int64Array) -> Int64Array:
        first, last = self._model.first_item_id, self._model.num_item_rows - 1
        unknown = np.flatnonzero((item_ids < first) | (item_ids > last))
        if len(unknown):
            place = f"{field}[{unknown[0]}]"
            raise InvalidRequestError(
                f"{place}: unknown item {item_ids[unknown[0]]}; this model knows {first} to {last}",
                place,
            )
        return item_ids

    def _times(self, history: History, request_time: int | None) -> tuple[Int64Array, int]:
        """Seconds of each event, and of the request; zeros where the model uses no times."""
        if not self._model.uses_timestamps:
            return np.zeros(len(history.item_ids), dtype=np.int64), 0
        if history.timestamps is None:
            raise InvalidRequestError(
                "history.timestamps: required, this model uses times", "history.timestamps"
            )
        times = history.timestamps
        backwards = np.flatnonzero(times[1:] < times[:-1])
        if len(backwards):
            place = f"history.timestamps[{backwards[0] + 1}]"
            raise InvalidRequestError(
                f"{place}: is earlier than the event before it; events go oldest first", place
            )
        asked_at = int(times[-1]) if request_time is None else request_time
        if asked_at < times[-1]:
            raise InvalidRequestError(
                f"request_time: {asked_at} is before the last event at {times[-1]}",
                "request_time",
            )
        return times, asked_at

    def _actions(self, history: History) -> Int64Array:
        if not self._model.num_actions:
            return np.zeros(len(history.item_ids), dtype=np.int64)
        if history.actions is None:
            raise InvalidRequestError(
                "history.actions: required, this model reads actions", "history.actions"
            )
        return _ids("history.actions", history.actions, self._model.num_actions)

    def _context(self, context: dict[str, Any] | None) -> Int64Array:
        sent, known = context or {}, self._model.contextual_features
        if sent and not known:
            raise InvalidRequestError("context: this model takes no contextual features", "context")
        names = [feature.name for feature in known]
        for name in sent:
            if name not in names:
                field = f"context.{name}"
                raise InvalidRequestError(
                    f"{field}: unknown feature; this model takes {', '.join(names)}", field
                )
        for name in names:
            if name not in sent:
                raise InvalidRequestError(
                    f"context.{name}: required, this model reads it", f"context.{name}"
                )
        ids = [
            _ids(f"context.{one.name}", [_plain(sent[one.name])], one.num_rows, indexed=False)
            for one in known
        ]
        return np.concatenate([*ids, np.empty(0, dtype=np.int64)])


def _plain(value: Any) -> Any:
    """NumPy's integers as Python's."""
    return int(value) if isinstance(value, np.integer) else value


def _ids(field: str, sent: object, num_rows: int, indexed: bool = True) -> Int64Array:
    """Ids of a table, int64 [n]; of these only item ids, actions and times were checked before."""

    def refuse(place: int | None, problem: str) -> InvalidRequestError:
        name = field if place is None or not indexed else f"{field}[{place}]"
        return InvalidRequestError(f"{name}: {problem}", name)

    try:
        ids = to_int_array(sent)
    except PydanticCustomError as error:
        raise refuse((error.context or {}).get("index"), error.message()) from None
    beyond = np.flatnonzero((ids < 0) | (ids >= num_rows))
    if len(beyond):
        last = num_rows - 1
        raise refuse(int(beyond[0]), f"{ids[beyond[0]]} is unknown; this model knows 0 to {last}")
    return ids


def _check_lengths(group: str, lengths: dict[str, int]) -> None:
    expected = lengths["item_ids"]
    for name, length in lengths.items():
        if length != expected:
            field = f"{group}.{name}"
            raise InvalidRequestError(
                f"{field}: has {length} values, {group}.item_ids has {expected}", field
            )
