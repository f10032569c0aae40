"""From a finished engine request to the client's answer."""

from __future__ import annotations

import time

import numpy as np

from helm_engine.exceptions import HelmError
from helm_engine.input_processor import PreparedRequest
from helm_engine.protocol import Recommendation, RecommendedItem, TimingsMs, Usage
from helm_engine.request import Request
from model_executor.step import Float32Array


def build_recommendation(
    prepared: PreparedRequest, model_name: str, answer_id: str | None = None
) -> Recommendation:
    """Ranks the scores of a finished request, best first; ties keep the order sent.

    Raises:
        HelmError: a score is not a number, which no input should bring about.
    """
    request = prepared.request
    if request.retrieved is not None:
        item_ids, scores = request.retrieved
        _refuse_nan(scores)
        ranks = range(len(item_ids))
        data = list(map(RecommendedItem, ranks, item_ids.tolist(), scores.tolist()))
    else:
        data = _rank_candidates(prepared)
    return Recommendation(
        id=answer_id or request.request_id,
        created=int(time.time()),
        model=model_name,
        data=data,
        usage=_usage(request, len(prepared.candidate_ids)),
    )


def _rank_candidates(prepared: PreparedRequest) -> list[RecommendedItem]:
    assert prepared.request.scores is not None
    by_task = prepared.request.scores[prepared.place_of_candidate]
    _refuse_nan(by_task)
    scores = by_task[:, prepared.rank_task]
    order = np.argsort(-scores, kind="stable")
    if prepared.excluded is not None:
        order = order[~prepared.excluded[order]]
    index = order[: prepared.top_k]
    picked = (index.tolist(), prepared.candidate_ids[index].tolist(), scores[index].tolist())
    if not prepared.task_names:
        return list(map(RecommendedItem, *picked))
    return list(map(RecommendedItem, *picked, _named(by_task[index], prepared.task_names)))


def _named(by_task: Float32Array, names: tuple[str, ...]) -> list[dict[str, float]]:
    """Scores [n, tasks] as a dict for each row; most models have one task."""
    if len(names) == 1:
        (name,) = names
        return [{name: score} for score in by_task[:, 0].tolist()]
    return [dict(zip(names, row, strict=True)) for row in by_task.tolist()]


def _refuse_nan(scores: Float32Array) -> None:
    if not np.isfinite(scores).all():
        raise HelmError("the model gave a score that is not a number")


def _usage(request: Request, num_candidates: int) -> Usage:
    timings = request.timings_ms
    blocked = request.reuse_blocked
    started = request.arrival if request.first_scheduled is None else request.first_scheduled
    return Usage(
        history_tokens=request.num_tokens,
        cached_tokens=request.cached_tokens,
        reuse_blocked=None if blocked is None else blocked.value,
        candidates=num_candidates,
        rows_requested=request.rows_requested,
        rows_resident=request.rows_resident,
        timings_ms=TimingsMs(
            queue=(started - request.arrival) * 1e3,
            load=timings.load,
            prefill=timings.prefill,
            score=timings.score,
        ),
    )
