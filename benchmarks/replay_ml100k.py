"""Replays held-out MovieLens-100K events against a running server of the bundled model.

Every user comes twice, before the second last and before the last event, in the order of the
events' own times; the pool is much smaller than users x histories, so both tenants evict. The
served ranking figures are put beside those of a plain padded PyTorch pass over the same events.
A second server then gets each request twice, with its user and without one, which forbids reuse:
the two are interleaved and their latencies compared. (The twin of a request loads its rows, so
residency and reuse are taken from the first server, which sees no twins.)

    python benchmarks/replay_ml100k.py --json benchmarks/results/replay_ml100k.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import httpx
import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import track

from benchmarks.report import benchmark_parser, write_result
from benchmarks.server_process import served
from examples.hstu_training import (
    evaluate,
    load_whole,
    metrics_of_ranks,
    ranks_of_targets,
    score_events,
)
from helm_engine.datasets.ml100k import HeldOutEvent, MovieLens100K, load_ml100k

MODEL_DIR = REPOSITORY / "examples" / "models" / "hstu-ml-100k"
POOL_BYTES = 2_000_000
EMB_FRACTION = 0.1
QUICK_REQUESTS = 500
RESAMPLES = 1000
NOT_SERVED = 11
"""Rank of a target that is not among the ten items served."""


@dataclass
class Served:
    """What the server said to one held-out event."""

    split: str
    event: HeldOutEvent
    answer: dict[str, Any]


@dataclass
class Pair:
    """How long one request took with reuse and without."""

    reused_tokens: int
    seconds: float
    seconds_without_reuse: float


def replay_order(dataset: MovieLens100K) -> list[tuple[str, HeldOutEvent]]:
    """Both held-out events of every user, in the order of their times."""
    questions = [("validation", event) for event in dataset.held_out("validation")]
    questions += [("test", event) for event in dataset.held_out("test")]
    # Stable: with equal times a user's second last event stays before the last.
    return sorted(questions, key=lambda question: question[1].request_time)


def body_of(event: HeldOutEvent, user: str | None) -> dict[str, Any]:
    """A retrieval of ten unseen items just before the event."""
    history = {"item_ids": event.item_ids.tolist(), "timestamps": event.timestamps.tolist()}
    body: dict[str, Any] = {
        "history": history,
        "request_time": event.request_time,
        "top_k": 10,
        "exclude_history": True,
    }
    return body if user is None else {**body, "user": user}


def ask(client: httpx.Client, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Sends a request; returns the answer and how long it took."""
    started = time.perf_counter()
    response = client.post("/v1/recommend", json=body)
    seconds = time.perf_counter() - started
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer, seconds


def replay(client: httpx.Client, questions: list[tuple[str, HeldOutEvent]]) -> list[Served]:
    """Asks every question once, as its user."""
    return [
        Served(split, event, ask(client, body_of(event, f"user-{event.user_index}"))[0])
        for split, event in track(questions, description="replaying")
    ]


def time_pairs(client: httpx.Client, questions: list[tuple[str, HeldOutEvent]]) -> list[Pair]:
    """Asks every question twice, as its user and as nobody, in alternating order."""
    pairs = []
    for number, (_, event) in enumerate(track(questions, description="timing")):
        as_user = body_of(event, f"user-{event.user_index}")
        as_nobody = body_of(event, None)
        if number % 2:
            answer, seconds = ask(client, as_user)
            _, without = ask(client, as_nobody)
        else:
            _, without = ask(client, as_nobody)
            answer, seconds = ask(client, as_user)
        pairs.append(Pair(answer["usage"]["cached_tokens"], seconds, without))
    return pairs


def ranking_figures(served: list[Served]) -> dict[str, float]:
    """HR@10 and NDCG@10 of the served lists."""
    ranks = []
    for one in served:
        items = [item["item_id"] for item in one.answer["data"]]
        found = one.event.target_item in items
        ranks.append(items.index(one.event.target_item) + 1 if found else NOT_SERVED)
    return asdict(metrics_of_ranks(torch.tensor(ranks)))


def compare_scores(served: list[Served]) -> dict[str, float]:
    """Served scores against the plain pass, and the plain pass's figures for the same events."""
    events = [one.event for one in served]
    scores = score_events(*load_whole(MODEL_DIR), events)
    largest = 0.0
    for one, row in zip(served, scores.tolist(), strict=True):
        for item in one.answer["data"]:
            want = row[item["item_id"] - 1]
            largest = max(largest, abs(item["score"] - want) / max(1.0, abs(want)))
    metrics = metrics_of_ranks(ranks_of_targets(scores, events))
    return {**asdict(metrics), "max_score_diff": largest}


def usage_figures(served: list[Served]) -> dict[str, float]:
    """Shares of tokens reused and of rows resident."""
    totals = {
        name: sum(one.answer["usage"][name] for one in served)
        for name in ("history_tokens", "cached_tokens", "rows_requested", "rows_resident")
    }
    shifted = sum(one.answer["usage"]["reuse_blocked"] == "window_shifted" for one in served)
    return {
        "cached_token_share": totals["cached_tokens"] / totals["history_tokens"],
        "row_hit_share": totals["rows_resident"] / totals["rows_requested"],
        "window_shifted_share": shifted / len(served),
    }


def latency_figures(pairs: list[Pair], seed: int) -> dict[str, Any]:
    """Latencies, and the ratio with reuse over without, with its 95 % bootstrap interval."""
    reuse = np.array([pair.seconds for pair in pairs]) * 1e3
    none = np.array([pair.seconds_without_reuse for pair in pairs]) * 1e3
    picks = np.random.default_rng(seed).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    ratios = reuse[picks].sum(axis=1) / none[picks].sum(axis=1)
    return {
        "requests": len(pairs),
        "p50_ms": float(np.median(reuse)),
        "p99_ms": float(np.quantile(reuse, 0.99)),
        "mean_ms_over_without_reuse": float(reuse.sum() / none.sum()),
        "mean_ms_over_without_reuse_95": np.quantile(ratios, [0.025, 0.975]).tolist(),
    }


def summarise(served: list[Served]) -> dict[str, Any]:
    """Ranking figures of the last events, and what the caches did for all."""
    tests = [one for one in served if one.split == "test"]
    return {
        "requests": len(served),
        "test_requests": len(tests),
        "served": ranking_figures(tests),
        "offline": compare_scores(tests),
        "usage": usage_figures(served),
        "usage_test_only": usage_figures(tests),
    }


def offline_figures(dataset: MovieLens100K) -> dict[str, float]:
    """What the training script reports for the saved model."""
    return asdict(evaluate(*load_whole(MODEL_DIR), dataset, "test", remove_seen=True))


@contextmanager
def running_server(device: str) -> Iterator[httpx.Client]:
    """A client of a server of the bundled model over a small pool."""
    flags = ["--pool-bytes", str(POOL_BYTES), "--emb-fraction", str(EMB_FRACTION)]
    with (
        served(MODEL_DIR, "--device", device, *flags) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def main() -> None:
    """Replays and times, each against a server of its own, and writes the figures."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="of the server: cpu, cuda or cuda:N")
    parser.add_argument("--data", type=Path, help="a copy of MovieLens-100K; default: download it")
    arguments = parser.parse_args()
    dataset = load_ml100k(arguments.data)
    questions = replay_order(dataset)
    if arguments.quick:
        questions = questions[-QUICK_REQUESTS:]
    with running_server(arguments.device) as client:
        figures = summarise(replay(client, questions))
        layout = client.get("/info").json()["layout"]
        gauges = {
            sample.name: sample.value
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
        }
    with running_server(arguments.device) as client:
        pairs = time_pairs(client, questions)
    reusing = [pair for pair in pairs if pair.reused_tokens]
    figures["latency"] = latency_figures(pairs, arguments.seeds[0])
    figures["latency_where_kv_was_reused"] = latency_figures(reusing, arguments.seeds[0])
    figures["offline_over_all_users"] = offline_figures(dataset)
    figures["pool"] = {
        "pages": layout["num_pages"],
        "emb_pages": layout["num_emb_pages"],
        "page_bytes": layout["page_bytes"],
        "emb_cache_usage": gauges["helm:emb_cache_usage_perc"],
    }
    write_result(arguments.json, figures, arguments.seeds)


if __name__ == "__main__":
    main()
