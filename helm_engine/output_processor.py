"""From a finished engine request to the client's answer."""

from __future__ import annotations

import time

import numpy as np

from helm_engine.exceptions import HelmError
from helm_engine.input_processor import PreparedRequest
from helm_engine.protocol import Recommendation, RecommendedItem, TimingsMs, Usage
from helm_engine.request import Request
from model_executor.step import Float32Array, Int64Array


def build_recommendation(prepared: PreparedRequest, model_name: str) -> Recommendation:
    """Ranks the scores of a finished request, best first; ties keep the order sent.

    Raises:
        HelmError: a score is not a number, which no input should bring about.
    """
    request = prepared.request
    if request.retrieved is not None:
        item_ids, scores = request.retrieved
        index = np.arange(len(item_ids))
    else:
        index, item_ids, scores = _rank_candidates(prepared)
    if not np.isfinite(scores).all():
        raise HelmError("the model gave a score that is not a number")
    triples = zip(index.tolist(), item_ids.tolist(), scores.tolist(), strict=True)
    return Recommendation.model_construct(
        id=request.request_id,
        created=int(time.time()),
        model=model_name,
        data=[RecommendedItem(*triple) for triple in triples],
        usage=_usage(request, len(prepared.candidate_ids)),
    )


def _rank_candidates(prepared: PreparedRequest) -> tuple[Int64Array, Int64Array, Float32Array]:
    scores = prepared.request.scores[prepared.place_of_candidate]
    order = np.argsort(-scores, kind="stable")
    index = order[~prepared.excluded[order]][: prepared.top_k]
    return index, prepared.candidate_ids[index], scores[index]


def _usage(request: Request, num_candidates: int) -> Usage:
    timings = request.timings_ms
    blocked = request.reuse_blocked
    started = request.arrival if request.first_scheduled is None else request.first_scheduled
    return Usage.model_construct(
        history_tokens=request.num_rows,
        cached_tokens=request.cached_tokens,
        reuse_blocked=None if blocked is None else blocked.value,
        candidates=num_candidates,
        rows_requested=request.rows_requested,
        rows_resident=request.rows_resident,
        timings_ms=TimingsMs.model_construct(
            queue=(started - request.arrival) * 1e3,
            load=timings.load,
            prefill=timings.prefill,
            score=timings.score,
        ),
    )
