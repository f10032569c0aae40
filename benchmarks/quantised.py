"""What rows and KV in eight bits cost: the error of final scores, and how the order survives.

The same requests go to an engine in float32 and to engines with `--row-dtype` and
`--kv-cache-dtype`, all with torch attention and with their caches on. Errors are relative to
max(1, |score|) over all candidates. The bundled model ranks all items for the held-out events of
MovieLens-100K, so its hit rates can be compared too; the other cell is a small ranking model with
random weights, whose scores spread differently from a trained model's.

    python benchmarks/quantised.py --json benchmarks/results/quantised.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress

from benchmarks.replay_ml100k import MODEL_DIR, body_of, replay_order
from benchmarks.report import benchmark_parser, write_result
from benchmarks.returning_visits import model_dir, returning_visits
from block_manager.pool_layout import PoolConfig
from helm_engine.config import EngineConfig, ExecutorConfig, SchedulerConfig
from helm_engine.datasets.ml100k import MovieLens100K, load_ml100k
from helm_engine.recommender import Recommender

TOP = 10
USERS = 16
FORMATS = (("auto", "auto"), ("int8", "auto"), ("fp8", "auto"), ("auto", "fp8"), ("int8", "fp8"))
"""Row dtype and KV dtype; the first is what the others are held against."""

FloatArray = npt.NDArray[np.float64]


class Question(NamedTuple):
    """A request, and what is known of its answer."""

    body: dict[str, Any]
    target: int | None = None
    """The item that came next."""


def movielens_questions(dataset: MovieLens100K) -> Iterator[Question]:
    """Each user's two held-out events, in the order of their times, with all items to rank."""
    for _, event in replay_order(dataset):
        body = body_of(event, f"user-{event.user_index}")
        seen = set(event.item_ids.tolist())
        unseen = [item for item in range(1, dataset.num_items + 1) if item not in seen]
        for key in ("top_k", "exclude_history"):
            del body[key]
        yield Question({**body, "candidates": {"item_ids": unseen}}, event.target_item)


def returning_questions(seed: int) -> Iterator[Question]:
    """Returning users with 640 events and 256 candidates."""
    for asked in returning_visits("abs", 640, 8, USERS, seed):
        yield Question(json.loads(asked.with_user))


def scores_of(recommender: Recommender, question: Question) -> tuple[FloatArray, int]:
    """Scores in the order of the candidates, and tokens reused."""
    answer = recommender.recommend(question.body)
    scores = np.empty(len(answer.data))
    for item in answer.data:
        scores[item.index] = item.score
    return scores, answer.usage.cached_tokens


def compare(exact: FloatArray, rough: FloatArray) -> tuple[float, float, float, float]:
    """Largest and mean relative error, share of the best ten kept, whether the best is."""
    errors = np.abs(rough - exact) / np.maximum(1.0, np.abs(exact))
    want, got = (np.argsort(-one, kind="stable")[:TOP] for one in (exact, rough))
    kept = len(np.intersect1d(want, got)) / min(TOP, len(exact))
    return float(errors.max()), float(errors.mean()), kept, float(want[0] == got[0])


def hit(question: Question, scores: FloatArray) -> tuple[float, float]:
    """Whether the next item is among the best ten, and its discounted gain."""
    items = np.array(question.body["candidates"]["item_ids"])
    place = int((scores > scores[np.flatnonzero(items == question.target)[0]]).sum())
    return (1.0, 1.0 / np.log2(place + 2.0)) if place < TOP else (0.0, 0.0)


def run_cell(
    name: str, directory: Path, questions: list[Question], progress: Progress
) -> list[dict[str, Any]]:
    """One model in all formats."""
    task = progress.add_task(name, total=len(FORMATS) * len(questions))
    exact: list[FloatArray] = []
    cells = []
    for row_dtype, kv_dtype in FORMATS:
        config = EngineConfig(
            directory,
            pool=PoolConfig(256 << 20, emb_fraction=0.25),
            scheduler=SchedulerConfig(max_num_batched_tokens=8192),
            executor=ExecutorConfig(
                attention_backend="torch",
                row_dtype=row_dtype,
                kv_cache_dtype=kv_dtype,
                max_retrieval_matrix_bytes=0,
            ),
        )
        errors, hits, reused = [], [], 0
        with Recommender.from_config(config) as recommender:
            layout = recommender.engine.served.layout
            elements = recommender.engine.served.model_config.kv_elements_per_token
            for place, question in enumerate(questions):
                scores, cached = scores_of(recommender, question)
                reused += cached
                if row_dtype == kv_dtype == "auto":
                    exact.append(scores)
                errors.append(compare(exact[place], scores))
                if question.target is not None:
                    hits.append(hit(question, scores))
                progress.advance(task)
        table = np.array(errors)
        cells.append(
            {
                "model": name,
                "row_dtype": row_dtype,
                "kv_cache_dtype": kv_dtype,
                "row_bytes": layout.row_bytes,
                "kv_bytes_per_token": elements * config.executor.kv_number_bytes,
                "largest_relative_error": float(table[:, 0].max()),
                "mean_relative_error": float(table[:, 1].mean()),
                "top_10_agreement": float(table[:, 2].mean()),
                "best_item_agreement": float(table[:, 3].mean()),
                "hr_10": float(np.mean([one for one, _ in hits])) if hits else None,
                "ndcg_10": float(np.mean([one for _, one in hits])) if hits else None,
                "cached_tokens": reused,
                "requests": len(questions),
            }
        )
    return cells


def main() -> None:
    """Runs both models."""
    arguments = benchmark_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    held_out = list(movielens_questions(load_ml100k()))
    visits = [
        question
        for seed in arguments.seeds
        for question in islice(returning_questions(seed), 2 * USERS if arguments.quick else 96)
    ]
    if arguments.quick:
        held_out = held_out[-200:]
    with Progress() as progress:
        cells = run_cell("hstu-ml-100k", MODEL_DIR, held_out, progress)
        cells += run_cell("abs_640", model_dir("abs", 640), visits, progress)
    write_result(arguments.json, {"cells": cells, "threads": 1}, arguments.seeds)


if __name__ == "__main__":
    main()
