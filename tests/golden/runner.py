"""Runs golden cases through the layers, the attention backend and the paged KV that `serve` uses.

No maths of its own: cases with item ids become a model directory and go through scheduler, pool
and model runner; cases of float rows enter after the embedding. Blocks are small and the token
budget is smaller than a history, so that prefill is chunked and pages are many.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from block_manager.block_hash import hash_blocks, root_hash
from block_manager.pool_layout import PAGE_ALIGNMENT, PoolConfig, plan_layout
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, ExecutorConfig, SchedulerConfig
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.input_processor import PreparedRequest
from helm_engine.output_processor import build_recommendation
from helm_engine.request import Request
from model_executor.attention.registry import attention_backend
from model_executor.checkpoint import save_model
from model_executor.model_config import ModelConfig
from model_executor.models.hstu import HSTU
from model_executor.page_arena import ELEMENT_BYTES, PageArena
from model_executor.paged_batch import build_paged_batch
from model_executor.step import Int64Array, ScheduledRequest
from tests.golden.case import ITEM_TABLE, CaseError, GoldenCase

BLOCK_TOKENS = 4
TOKENS_PER_STEP = 7
NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """How close one output came."""

    name: str
    largest_error: float
    passed: bool


def run_case(case: GoldenCase, device: str = "cpu") -> list[OutputCheck]:
    """Reproduces every output of a case.

    Raises:
        CaseError: the case has inputs or outputs of a kind that is not known.
    """
    try:
        produced: dict[str, list[Tensor]] = {}
        for name, tensor in _produce(case, device):
            produced.setdefault(name, []).append(tensor)
        return [_check(case, name, produced) for name in case.outputs]
    except KeyError as error:
        raise CaseError(f"{case.path}: {error} is missing") from error


def _produce(case: GoldenCase, device: str) -> Iterator[tuple[str, Tensor]]:
    if "in.x" in case.tensors:
        return _run_float_rows(case, torch.device(device))
    if "in.ids" in case.tensors:
        return _run_encoder(case, device)
    if any(name.endswith(".ids") for name in case.header["inputs"]):
        return _run_appends(case, device)
    raise CaseError(f"{case.path}: inputs {case.header['inputs']} are of no known kind")


def _check(case: GoldenCase, name: str, produced: dict[str, list[Tensor]]) -> OutputCheck:
    """The worst of all times an output was produced."""
    if name not in produced:
        raise CaseError(f"{case.path}: output {name!r} is of no known kind")
    checks = [_compare(case, name, got) for got in produced[name]]
    return max(checks, key=lambda check: (not check.passed, check.largest_error))


def _compare(case: GoldenCase, name: str, got: Tensor) -> OutputCheck:
    want = case.tensors[name]
    if got.shape != want.shape:
        raise CaseError(
            f"{case.path}: output {name!r} has shape {list(got.shape)}, not {list(want.shape)}"
        )
    atol, rtol = case.tolerance
    error = (got.double() - want.double()).abs()
    # A NaN fails the comparison, and must not vanish in the largest error either.
    allowed = atol + rtol * want.double().abs()
    passed = (
        bool((error <= allowed).all()) if want.is_floating_point() else bool((error == 0).all())
    )
    largest = float(error.nan_to_num(nan=torch.inf).max()) if error.numel() else 0.0
    return OutputCheck(name, largest, passed)


def _run_float_rows(case: GoldenCase, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Rows enter after the embedding; all users run together, chunk by chunk."""
    config = case.model_config()
    model = HSTU(config)
    case.load_dense_weights(model)
    model.to(device)
    offsets = case.tensors["in.offsets"].numpy()
    lengths = np.diff(offsets)
    times = case.tensors["in.timestamps"].numpy()
    layout = plan_layout(
        _pool_for(config, num_histories=len(lengths), emb_fraction=0.0),
        kv_bytes_per_token=config.kv_elements_per_token * ELEMENT_BYTES,
        row_bytes=config.embedding_dim * ELEMENT_BYTES,
        max_sequence_len=config.max_sequence_len,
        staging_rows=0,
    )
    arena = PageArena(layout, config, device)
    tables = _scattered_tables(lengths, layout.num_pages)
    x = case.tensors["in.x"].to(device)
    y = torch.full_like(x, torch.nan)
    attention = attention_backend("torch")
    with torch.inference_mode():
        for start in range(0, int(lengths.max()), TOKENS_PER_STEP):
            chunks, places = [], []
            for user in np.flatnonzero(lengths > start):
                end = min(start + TOKENS_PER_STEP, int(lengths[user]))
                chunks.append(
                    ScheduledRequest(
                        request_id=str(user),
                        start=start,
                        row_index=np.arange(start, end),
                        block_table=tables[user],
                        event_times=times[user, : end + 1],
                        task=None,
                    )
                )
                places.append(np.arange(offsets[user] + start, offsets[user] + end))
            rows = torch.from_numpy(np.concatenate(places)).to(device)
            batch = build_paged_batch(chunks, BLOCK_TOKENS, device)
            y[rows] = model.encode(x[rows], batch, arena.kv, attention)
    yield "out.y", y.cpu()


def _pool_for(config: ModelConfig, num_histories: int, emb_fraction: float) -> PoolConfig:
    """A pool that holds a few longest histories, and a quarter more."""
    blocks = 1 + num_histories * -(-config.max_sequence_len // BLOCK_TOKENS)
    row_bytes = config.embedding_dim * ELEMENT_BYTES
    block_bytes = BLOCK_TOKENS * config.kv_elements_per_token * ELEMENT_BYTES
    page_bytes = max(block_bytes, row_bytes) + PAGE_ALIGNMENT
    return PoolConfig(
        pool_bytes=TOKENS_PER_STEP * row_bytes + page_bytes * (5 * blocks // 4 + 1),
        emb_fraction=emb_fraction,
        block_tokens=BLOCK_TOKENS,
    )


def _scattered_tables(lengths: Int64Array, num_pages: int) -> list[Int64Array]:
    """Block tables over pages in no order."""
    counts = -(-lengths // BLOCK_TOKENS)
    pages = np.random.default_rng(0).permutation(np.arange(1, num_pages))[: counts.sum()]
    return np.split(pages, np.cumsum(counts)[:-1])


def _load(case: GoldenCase, device: str) -> LoadedEngine:
    """Writes the case as a model directory and loads it as `serve` would."""
    config = case.model_config()
    model = HSTU(config)
    case.load_dense_weights(model)
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory), model, case.tensors[ITEM_TABLE])
        engine = load_engine(
            EngineConfig(
                Path(directory),
                pool=_pool_for(config, num_histories=2, emb_fraction=0.2),
                scheduler=SchedulerConfig(max_num_batched_tokens=TOKENS_PER_STEP),
                executor=ExecutorConfig(device=device),
                poison_freed_memory=True,
            ),
            SystemClock(),
        )
    engine.runner.model.normaliser = case.header["normaliser_n"]
    return engine


def _request(
    request_id: str,
    item_ids: Int64Array,
    times: Int64Array,
    *,
    user: str | None = None,
    candidates: Int64Array = NOTHING,
    top_k: int = 1,
    excluded: Int64Array = NOTHING,
) -> Request:
    """An engine request over a whole history; `times` has the request's time at the end."""
    hashes = []
    if user is not None:
        features = np.stack([item_ids, times[:-1], times[1:]], axis=1)
        hashes = hash_blocks(root_hash("golden", user.encode()), features[:-1], BLOCK_TOKENS)
    return Request(
        request_id=request_id,
        item_ids=item_ids,
        event_times=times,
        candidate_ids=candidates,
        top_k=top_k,
        excluded_ids=np.unique(excluded),
        block_hashes=hashes,
        arrival=0.0,
    )


def _run_rows(engine: LoadedEngine, request: Request) -> tuple[Tensor, int]:
    """Every row of a request after the output norm, NaN where it was reused; and how many were."""
    scheduler, runner = engine.core.scheduler, engine.runner
    rows = torch.full((request.num_rows, engine.model_config.embedding_dim), torch.nan)
    scheduler.add_request(request)
    while scheduler.has_work:
        step = scheduler.schedule(0.0)
        assert step is not None
        (chunk,) = step.requests
        rows[chunk.start : chunk.start + chunk.num_rows] = runner.encode(step).cpu()
        # The step again, with its scores: rows loaded once more, K and V written once more.
        scheduler.update(step, runner.execute(step), 0.0)
    scheduler.check_integrity()
    return rows, request.cached_tokens


def _answer(engine: LoadedEngine, request: Request) -> None:
    engine.core.add_request(request)
    while engine.core.has_work:
        engine.core.step()
    if request.error is not None:
        raise CaseError(f"request {request.request_id}: {request.error}")


def _run_encoder(case: GoldenCase, device: str) -> Iterator[tuple[str, Tensor]]:
    engine = _load(case, device)
    lengths = case.tensors["in.lengths"].tolist()
    ids, times = case.tensors["in.ids"].numpy(), case.tensors["in.timestamps"].numpy()
    candidates = case.tensors["in.candidate_ids"].numpy()
    top_k = case.tensors["out.topk_ids"].shape[1]
    all_rows = torch.zeros(*ids.shape, engine.model_config.embedding_dim)
    scores, best_ids, best_scores = [], [], []
    for user, length in enumerate(lengths):
        history, events = ids[user, :length], times[user, : length + 1]
        all_rows[user, :length], _ = _run_rows(engine, _request(f"rows-{user}", history, events))
        scored = _request(f"score-{user}", history, events, candidates=candidates)
        _answer(engine, scored)
        scores.append(torch.from_numpy(scored.scores))
        prepared = PreparedRequest(
            request=scored,
            top_k=top_k,
            candidate_ids=candidates,
            place_of_candidate=np.arange(len(candidates)),
            excluded=np.isin(candidates, history),
        )
        ranked = build_recommendation(prepared, "golden").data
        best_ids.append(torch.tensor([item.item_id for item in ranked]))
        best_scores.append(torch.tensor([item.score for item in ranked]))
        if len(np.unique(candidates)) == engine.model_config.num_items:
            # The candidates are the catalogue: retrieval must find the same items.
            found = _request(f"find-{user}", history, events, top_k=top_k, excluded=history)
            _answer(engine, found)
            assert found.retrieved is not None
            best_ids[-1] = torch.from_numpy(found.retrieved[0])
            best_scores[-1] = torch.from_numpy(found.retrieved[1])
    yield "out.all_rows", all_rows
    rows = [all_rows[user, :length] for user, length in enumerate(lengths)]
    yield "out.all_rows_jagged", torch.cat(rows)
    yield "out.last_row", torch.stack([user_rows[-1] for user_rows in rows])
    yield "out.scores", torch.stack(scores)
    yield "out.topk_ids", torch.stack(best_ids)
    yield "out.topk_scores", torch.stack(best_scores)


def _run_appends(case: GoldenCase, device: str) -> Iterator[tuple[str, Tensor]]:
    """Each run on cold pages, then all runs again as one user who returns.

    Both passes are checked; of the second, rows that were reused are those of the first.
    """
    engine = _load(case, device)
    runs = [name[3:-4] for name in case.header["inputs"] if name.endswith(".ids")]
    cold: dict[str, Tensor] = {}
    for run, user in [(run, None) for run in runs] + [(run, "returning") for run in runs]:
        item_ids = case.tensors[f"in.{run}.ids"].numpy()
        times = case.tensors[f"in.{run}.timestamps"].numpy()
        computed, reused = _run_rows(engine, _request(f"{run}-{user}", item_ids, times, user=user))
        if user is None:
            cold[run] = computed
        computed[:reused] = cold[run][:reused]
        yield f"out.{run}.rows", computed
