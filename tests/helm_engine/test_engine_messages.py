"""Messages between front and core: what goes in on one side comes out on the other."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from block_manager.block_hash import hash_blocks, root_hash
from helm_engine import exceptions
from helm_engine.array_frames import INLINE_BYTES, FrameDecoder, FrameEncoder
from helm_engine.engine_messages import (
    AddRequest,
    CoreReport,
    EndedRequest,
    ForgetUser,
    FromCore,
    RequestError,
    ToCore,
)
from helm_engine.engine_stats import EngineStats
from helm_engine.request import Request, RequestStatus, ReuseBlocked
from model_executor.inputs.features import TokenSequence
from model_executor.step import StepTimings


class _Holder(msgspec.Struct):
    arrays: list[np.ndarray[Any, Any]]
    text: str


@given(
    st.lists(
        arrays.arrays(
            st.sampled_from(["<i8", "<f4", "bool"]).map(np.dtype[Any]),
            arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=60),
        ),
        max_size=4,
    ),
    st.text(),
    st.booleans(),
)
def test_arrays_of_any_size_and_layout_come_out_as_they_went_in(
    sent: list[np.ndarray[Any, Any]], text: str, transposed: bool
) -> None:
    sent = [array.T for array in sent] if transposed else sent
    frames = FrameEncoder().encode(_Holder(sent, text))
    large = sum(array.nbytes >= INLINE_BYTES for array in sent)
    assert len(frames) == 1 + large
    received: _Holder = FrameDecoder[_Holder](_Holder).decode([memoryview(f) for f in frames])
    assert received.text == text
    for before, after in zip(sent, received.arrays, strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        np.testing.assert_array_equal(before, after)


def test_what_is_no_number_is_not_sent() -> None:
    for thing in (np.array([object()]), object()):
        with pytest.raises(TypeError, match="cannot be sent"):
            FrameEncoder().encode([thing])


def _request(length: int) -> Request:
    rng = np.random.default_rng(length)
    tokens = TokenSequence(
        rows=rng.integers(0, 99, length),
        features=rng.integers(0, 99, (length, 3)),
        candidate_rows=rng.integers(0, 99, 5),
        candidate_features=rng.integers(0, 99, (5, 3)),
        num_final=length - 1,
    )
    return Request(
        request_id="r",
        tokens=tokens,
        top_k=3,
        excluded_ids=np.array([4, 5]),
        block_hashes=hash_blocks(root_hash("m", b"u"), tokens.hash_inputs(), 4),
        arrival=1.5,
        deadline=float("inf"),
        priority=-2,
        user_tag=77,
        reuse_hindrance=ReuseBlocked.WINDOW_SHIFTED,
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, TokenSequence):
        return all(_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, tuple):
        return all(map(_equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("length", [1, 40, 5000])
def test_a_request_reaches_the_core_whole(length: int) -> None:
    request = _request(length)
    frames = FrameEncoder().encode(AddRequest.of(request))
    message = FrameDecoder[ToCore](ToCore).decode(frames)
    assert isinstance(message, AddRequest)
    received = message.request()
    for field in fields(Request):
        assert _equal(getattr(request, field.name), getattr(received, field.name)), field.name


def test_an_outcome_reaches_the_front_whole() -> None:
    ended = _request(9)
    ended.scores = np.ones((5, 2), dtype=np.float32)
    ended.retrieved = np.arange(3), np.ones(3, dtype=np.float32)
    ended.status = RequestStatus.FINISHED
    ended.num_scored, ended.cached_tokens = 5, 4
    ended.rows_requested, ended.rows_resident = 7, 6
    ended.first_scheduled, ended.finished_at = 2.0, 3.0
    ended.timings_ms = StepTimings(1.0, 2.0, 3.0)
    frames = FrameEncoder().encode(CoreReport(EngineStats(steps=8), [EndedRequest.of(ended)]))
    message = FrameDecoder[FromCore](FromCore).decode(frames)
    assert isinstance(message, CoreReport)
    waiting = _request(9)
    message.ended[0].complete(waiting)
    assert message.stats.steps == 8
    for field in fields(Request):
        assert _equal(getattr(ended, field.name), getattr(waiting, field.name)), field.name


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(exceptions).values()
        if isinstance(kind, type) and issubclass(kind, exceptions.HelmError)
    ],
)
def test_every_error_reaches_the_front_as_what_it_is(kind: type[exceptions.HelmError]) -> None:
    received = RequestError.of(kind("why", "field")).exception()
    assert type(received) is kind
    assert (str(received), received.param) == ("why", "field")


def test_messages_of_another_kind_are_refused() -> None:
    frames = FrameEncoder().encode(ForgetUser(1, 2))
    with pytest.raises(msgspec.ValidationError):
        FrameDecoder[FromCore](FromCore).decode(frames)
