"""Cases of item ids for the `research` dialect: whole engines, users who come once or return."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from block_manager.block_hash import hash_blocks, root_hash
from helm_engine.engine_loader import LoadedEngine
from helm_engine.input_processor import PreparedRequest
from helm_engine.output_processor import build_recommendation
from helm_engine.request import Request
from model_executor.inputs.features import Events, RequestFeatures
from model_executor.inputs.research import ResearchInputs
from model_executor.model_config import ITEM_TABLE, ModelConfig, parse_model_config
from model_executor.models.sequence_model import RetrievalModel
from model_executor.step import Int64Array
from tests.golden.case import GoldenCase
from tests.golden.engine import BLOCK_TOKENS, answer, load
from tests.golden.weights import layer_weights

ITEMS = "_embedding_module._item_emb.weight"
POSITIONS = "_input_features_preproc._pos_emb.weight"
NOTHING = np.empty(0, dtype=np.int64)


def build_engine(case: GoldenCase, device: str) -> LoadedEngine:
    header = case.header
    layers = layer_weights(
        case.tensors, "research", header["num_layers"], header["num_heads"], case.path
    )
    config = _config(case, layers)
    weights = layers | {"position_embedding": case.tensors[POSITIONS]}
    return load(case, config, weights, {ITEM_TABLE: case.tensors[ITEMS]}, device)


def _config(case: GoldenCase, layers: dict[str, Tensor]) -> ModelConfig:
    """The case's model; all of its N positions may be history, so that nothing is cut."""
    header = case.header
    return parse_model_config(
        {
            "model_type": "hstu",
            "dialect": "research",
            "dtype": "float32",
            "num_items": len(case.tensors[ITEMS]) - 1,
            "embedding_dim": header["embedding_dim"],
            "num_layers": header["num_layers"],
            "num_heads": header["num_heads"],
            "dqk": header["dqk"],
            "dv": header["dv"],
            "max_sequence_len": (len(layers["layers.0.bias.position_weight"]) + 1) // 2,
            "max_output_len": 0,
            "num_time_buckets": len(layers["layers.0.bias.time_weight"]) - 1,
            "layer_norm_eps": header["layer_norm_eps"],
            "l2_norm_eps": 1e-6,
        },
        str(case.path),
    )


def request(
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

    def events(ids: Int64Array, seconds: Int64Array) -> Events:
        return Events(ids, seconds, np.zeros_like(ids), np.empty((len(ids), 0), dtype=np.int64))

    tokens = ResearchInputs().assemble(
        RequestFeatures(
            history=events(item_ids, times[:-1]),
            candidates=events(candidates, np.zeros_like(candidates)),
            context=NOTHING,
            request_time=int(times[-1]),
        )
    )
    hashes = []
    if user is not None:
        hashes = hash_blocks(root_hash("golden", user.encode()), tokens.hash_inputs(), BLOCK_TOKENS)
    return Request(
        request_id=request_id,
        tokens=tokens,
        top_k=top_k,
        excluded_ids=np.unique(excluded),
        block_hashes=hashes,
        arrival=0.0,
    )


def run_rows(engine: LoadedEngine, asked: Request) -> tuple[Tensor, int]:
    """Every row of a request after the output norm, NaN where it was reused; and how many were."""
    scheduler, runner = engine.core.scheduler, engine.runner
    assert isinstance(runner.model, RetrievalModel)
    rows = torch.full((asked.num_tokens, engine.served.model_config.embedding_dim), torch.nan)
    scheduler.add_request(asked)
    while scheduler.has_work:
        step = scheduler.schedule(0.0)
        assert step is not None
        (chunk,) = step.requests
        computed = runner.model.normalise_user(runner.encode(step))
        rows[chunk.start : chunk.start + chunk.num_rows] = computed.cpu()
        # The step again, with its scores: rows loaded once more, K and V written once more.
        scheduler.update(step, runner.execute(step), 0.0)
    scheduler.check_integrity()
    return rows, asked.cached_tokens


def run_encoder(case: GoldenCase, device: str) -> Iterator[tuple[str, Tensor]]:
    """Every row of every user, scores of candidates, and the best items."""
    engine = build_engine(case, device)
    lengths = case.tensors["in.lengths"].tolist()
    ids, times = case.tensors["in.ids"].numpy(), case.tensors["in.timestamps"].numpy()
    candidates = case.tensors["in.candidate_ids"].numpy()
    top_k = case.tensors["out.topk_ids"].shape[1]
    all_rows = torch.zeros(*ids.shape, engine.served.model_config.embedding_dim)
    scores, best_ids, best_scores = [], [], []
    for user, length in enumerate(lengths):
        history, events = ids[user, :length], times[user, : length + 1]
        all_rows[user, :length], _ = run_rows(engine, request(f"rows-{user}", history, events))
        scored = request(f"score-{user}", history, events, candidates=candidates)
        answer(engine, scored)
        assert scored.scores is not None
        scores.append(torch.from_numpy(scored.scores[:, 0]))
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
        if len(np.unique(candidates)) == engine.served.model_config.num_items:
            # The candidates are the catalogue: retrieval must find the same items.
            found = request(f"find-{user}", history, events, top_k=top_k, excluded=history)
            answer(engine, found)
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


def run_appends(case: GoldenCase, device: str) -> Iterator[tuple[str, Tensor]]:
    """Each run on cold pages, then all runs again as one user who returns.

    Both passes are checked; of the second, rows that were reused are those of the first.
    """
    engine = build_engine(case, device)
    runs = [name[3:-4] for name in case.header["inputs"] if name.endswith(".ids")]
    cold: dict[str, Tensor] = {}
    for run, user in [(run, None) for run in runs] + [(run, "returning") for run in runs]:
        item_ids = case.tensors[f"in.{run}.ids"].numpy()
        times = case.tensors[f"in.{run}.timestamps"].numpy()
        computed, reused = run_rows(engine, request(f"{run}-{user}", item_ids, times, user=user))
        if user is None:
            cold[run] = computed
        computed[:reused] = cold[run][:reused]
        yield f"out.{run}.rows", computed
