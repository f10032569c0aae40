"""Everything that needs a GPU, in one command: parity, the exactness gate, memory, timings.

Runs the engine as it stands on one CUDA device, writes `benchmarks/results/gpu_check.json` and
the device's cost profile for the simulator, and exits with status 1 if a check fails. Where
there is no GPU it does nothing and says so.

    make gpu-check
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/gpu_check.py`.

import numpy as np
import torch

from benchmarks.gpu_devices import check_pool_sizing, check_xformers
from benchmarks.report import write_result
from block_manager.pool_layout import PoolConfig
from examples.hstu_training import initialise
from helm_engine.config import EngineConfig, ExecutorConfig, SchedulerConfig
from helm_engine.recommender import Recommender
from model_executor.checkpoint import save_model
from model_executor.cost_profile import CostProfile
from model_executor.model_config import ITEM_TABLE, ModelConfig, ResearchConfig, parse_model_config
from model_executor.models.research import ResearchHSTU
from tests.golden.case import read_case
from tests.golden.runner import run_case
from tests.reference import ReferenceHSTU
from tests.toy_models import read_reference, toy_config, toy_engine_config, write_toy_model

RESULTS = REPOSITORY / "benchmarks" / "results"
PROFILES = REPOSITORY / "benchmarks" / "profiles"
GATE = 1e-5
SHAPE: dict[str, Any] = {
    "model_type": "hstu",
    "dialect": "research",
    "dtype": "float32",
    "num_items": 200_000,
    "embedding_dim": 256,
    "num_layers": 8,
    "num_heads": 4,
    "dqk": 64,
    "dv": 64,
    "max_sequence_len": 4096,
    "max_output_len": 16,
    "num_time_buckets": 128,
    "layer_norm_eps": 1e-6,
    "l2_norm_eps": 1e-6,
}
LENGTHS = (64, 256, 1024, 2048, 4096)
NUM_CANDIDATES = 256
REPEATS = 10


def check_golden(device: str) -> dict[str, float]:
    """Largest error of each golden case; outputs that do not count are left out.

    Raises:
        SystemExit: an output is outside its tolerance.
    """
    errors = {}
    for path in sorted((REPOSITORY / "tests" / "golden").glob("*.safetensors")):
        checks = [check for check in run_case(read_case(path), device) if not check.optional]
        errors[path.stem] = max(check.largest_error for check in checks)
        if not all(check.passed for check in checks):
            raise SystemExit(f"gpu-check: {path.name} fails: {checks}")
    return errors


def check_gate(device: str, seeds: range) -> float:
    """Largest |a - b| / max(1, |a|) of mixed traffic against the slow reference.

    Raises:
        SystemExit: it is above the gate.
    """
    largest = 0.0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        with tempfile.TemporaryDirectory() as directory:
            path = write_toy_model(Path(directory), toy_config(), seed)
            config = toy_engine_config(path, max_num_batched_tokens=int(rng.integers(5, 80)))
            config = replace(config, executor=ExecutorConfig(device=device))
            recommender = Recommender.from_config(config)
            largest = max(largest, _difference(recommender, read_reference(path), rng))
        recommender.engine.core.check_integrity()
    if not largest <= GATE:
        raise SystemExit(f"gpu-check: the exactness gate fails: {largest}")
    return largest


def _difference(
    recommender: Recommender, reference: ReferenceHSTU, rng: np.random.Generator
) -> float:
    """Largest difference over three users who return with longer histories, together."""
    items = rng.integers(1, 61, (3, 24))
    times = np.sort(rng.integers(0, 10**6, (3, 24)), axis=1)
    differences = []
    for length in (5, 17, 18, 24):
        histories = [
            {"item_ids": ids[:length].tolist(), "timestamps": seconds[:length].tolist()}
            for ids, seconds in zip(items, times, strict=True)
        ]
        answers = recommender.recommend_batch(
            {"user": f"u{n}", "history": one, "candidates": {"item_ids": list(range(1, 61))}}
            for n, one in enumerate(histories)
        )
        for one, answer in zip(histories, answers, strict=True):
            asked_at = one["timestamps"][-1]
            want = reference.scores(one["item_ids"], [*one["timestamps"], asked_at])
            expected = want[[item.item_id - 1 for item in answer.data]]
            got = np.array([item.score for item in answer.data])
            differences.append(np.abs(got - expected) / np.maximum(1.0, np.abs(expected)))
    return float(np.max(differences))


def write_random_model(directory: Path, config: ModelConfig) -> None:
    """A model directory of the shape to be timed."""
    torch.manual_seed(0)
    assert isinstance(config, ResearchConfig)
    model = ResearchHSTU(config)
    save_model(directory, model, {ITEM_TABLE: initialise(model)})


def history(rng: np.random.Generator, length: int) -> dict[str, list[int]]:
    """Random events of a month."""
    return {
        "item_ids": rng.integers(1, SHAPE["num_items"], length).tolist(),
        "timestamps": np.sort(rng.integers(0, 30 * 86_400, length)).tolist(),
    }


def timed(recommender: Recommender, body: dict[str, Any]) -> dict[str, float]:
    """One request: wall milliseconds, phases, tokens reused."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    answer = recommender.recommend(body)
    torch.cuda.synchronize()
    wall = (time.perf_counter() - started) * 1e3
    phases = {name: float(value) for name, value in asdict(answer.usage.timings_ms).items()}
    return {"wall": wall, "cached": float(answer.usage.cached_tokens), **phases}


def time_lengths(recommender: Recommender, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Recomputing (A) and reusing (B) a history, interleaved, for each length."""
    cells = []
    for length in LENGTHS:
        body = {
            "history": history(rng, length),
            "candidates": {
                "item_ids": rng.integers(1, SHAPE["num_items"], NUM_CANDIDATES).tolist()
            },
        }
        returning = {**body, "user": f"length-{length}"}
        for _ in range(3):  # The first ones allocate, load rows and fill the cache.
            timed(recommender, body)
            timed(recommender, returning)
        cold, warm = [], []
        for _ in range(REPEATS):
            cold.append(timed(recommender, body))
            warm.append(timed(recommender, returning))
        ratios = [a["wall"] / b["wall"] for a, b in zip(cold, warm, strict=True)]
        cells.append(
            {
                "history": length,
                "cached_tokens": int(warm[0]["cached"]),
                "ms_recompute": float(np.median([one["wall"] for one in cold])),
                "ms_cached": float(np.median([one["wall"] for one in warm])),
                "prefill_ms_recompute": float(np.median([one["prefill"] for one in cold])),
                "prefill_ms_cached": float(np.median([one["prefill"] for one in warm])),
                "ratio": float(np.median(ratios)),
                "ratio_min_max": [min(ratios), max(ratios)],
            }
        )
    return cells


def slope(recommender: Recommender, rng: np.random.Generator, phase: str, warm: bool) -> float:
    """Milliseconds of a phase per candidate, over numbers of candidates.

    Candidates seen before (`warm`) price scoring; never seen ones price a row miss.
    """
    numbers, costs = [], []
    unseen = iter(rng.permutation(np.arange(1, SHAPE["num_items"])).tolist())
    for number in (64, 256, 1024, 2048) * 5:
        items = list(range(1, number + 1)) if warm else [next(unseen) for _ in range(number)]
        body = {"history": history(rng, 1), "candidates": {"item_ids": items}}
        if warm:
            timed(recommender, body)
        numbers.append(number)
        costs.append(timed(recommender, body)[phase])
    return max(0.0, float(np.polyfit(numbers, costs, 1)[0]))


def fit_profile(
    recommender: Recommender, cells: list[dict[str, Any]], rng: np.random.Generator, device: str
) -> CostProfile:
    """Least squares of prefill time over rows and pairs, and slopes for the rest."""
    lengths = np.array([cell["history"] for cell in cells], dtype=float)
    spent = np.array([cell["prefill_ms_recompute"] for cell in cells])
    terms = np.stack([np.ones_like(lengths), lengths, lengths * (lengths + 1) / 2], axis=1)
    # Relative errors count: short histories are as common as long ones.
    solution = np.linalg.lstsq(terms / spent[:, None], np.ones_like(spent), rcond=None)[0]
    step_ms, prefill_row_ms, attention_pair_ms = (max(0.0, float(part)) for part in solution)
    search = {"history": history(rng, 1)}
    searches = [timed(recommender, search)["score"] for _ in range(REPEATS)]
    shape = f"{SHAPE['num_layers']} layers, D {SHAPE['embedding_dim']}, {SHAPE['num_heads']} heads"
    return CostProfile(
        device=device,
        source=f"make gpu-check; research HSTU, {shape} of {SHAPE['dqk']}, fp32, torch reference",
        step_ms=step_ms,
        prefill_row_ms=prefill_row_ms,
        attention_pair_ms=attention_pair_ms,
        candidate_ms=slope(recommender, rng, "score", warm=True),
        retrieval_ms=float(np.median(searches)),
        row_miss_ms=slope(recommender, rng, "load", warm=False),
    )


def check_memory(recommender: Recommender, before: int) -> dict[str, int]:
    """Idle device bytes against the ledger.

    Raises:
        SystemExit: more stays on the device than weights, pages and staging.
    """
    ledger = recommender.engine.runner.memory
    held = requested_bytes() - before
    if held != ledger.total:
        raise SystemExit(f"gpu-check: {held} bytes are held, the ledger says {ledger}")
    return {**asdict(ledger), "held": held}


def check_activations(recommender: Recommender, rng: np.random.Generator) -> dict[str, int]:
    """Peak of a step with a full budget against the bound told at start.

    Raises:
        SystemExit: the peak is above the bound.
    """
    idle = requested_bytes()
    torch.cuda.reset_peak_memory_stats()
    recommender.recommend_batch({"history": history(rng, LENGTHS[-1])} for _ in range(2))
    torch.cuda.synchronize()
    peak = int(torch.cuda.memory_stats()["requested_bytes.all.peak"]) - idle
    bound = recommender.engine.served.activation_bound
    if peak > bound:
        raise SystemExit(f"gpu-check: a step took {peak} bytes of activations, bound {bound}")
    return {"peak": peak, "bound": bound}


def requested_bytes() -> int:
    """Bytes that live tensors asked for, before the allocator's rounding."""
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def main() -> int:
    """Runs every check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu_check.json")
    parser.add_argument("--profiles", type=Path, default=PROFILES, help="folder for the profile")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device here; nothing was run")
        return 0
    name = torch.cuda.get_device_name()
    print(f"gpu-check: {name}")
    figures: dict[str, Any] = {"device": name, "shape": SHAPE, "candidates": NUM_CANDIDATES}
    figures["golden_largest_error"] = check_golden("cuda")
    figures["gate_largest_difference"] = check_gate("cuda", range(5))
    print("gpu-check: golden cases and the exactness gate pass")
    figures["xformers"] = check_xformers(torch.device("cuda", 0))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        write_random_model(Path(directory), parse_model_config(SHAPE, "gpu_check"))
        sized = EngineConfig(Path(directory), executor=ExecutorConfig(device="cuda"))
        figures["pool_sizing"] = check_pool_sizing(sized)
        before = requested_bytes()
        recommender = Recommender.from_config(
            EngineConfig(
                Path(directory),
                pool=PoolConfig(pool_bytes=8 << 30, emb_fraction=0.05, block_tokens=16),
                scheduler=SchedulerConfig(max_num_batched_tokens=8192),
                executor=ExecutorConfig(device="cuda"),
            )
        )
        figures["end_to_end"] = time_lengths(recommender, rng)
        profile = fit_profile(recommender, figures["end_to_end"], rng, name)
        figures["memory"] = check_memory(recommender, before)
        figures["activations"] = check_activations(recommender, rng)
    figures["cost_profile"] = asdict(profile)
    write_result(arguments.json, figures, [0], command="make gpu-check")
    arguments.profiles.mkdir(parents=True, exist_ok=True)
    target = arguments.profiles / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
    target.write_text(json.dumps(asdict(profile), indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures["end_to_end"], indent=2))
    print(f"gpu-check: wrote {arguments.json} and {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
