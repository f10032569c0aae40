"""The cost profile of a device: found again where it is known, measured on every kind of model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from helm_engine.clock import SystemClock
from helm_engine.engine_loader import load_engine
from helm_engine.entrypoints.cli import app
from helm_engine.profiling import MeasuredStep, fit_profile, measure_profile
from model_executor.cost_profile import CostProfile, StepWork, load_cost_profile
from model_executor.model_config import parse_model_config
from tests.e2e.running_server import BUNDLED_MODEL
from tests.toy_models import TOY_CONFIGS, toy_engine_config, write_toy_model

KNOWN = CostProfile(
    device="known",
    source="a test",
    step_ms=2.0,
    prefill_row_ms=0.008,
    attention_pair_ms=8e-6,
    candidate_ms=0.01,
    retrieval_ms=1.5,
    row_miss_ms=0.045,
    round_trip_ms=2.5,
    row_copy_ms=0.002,
    candidate_pair_ms=1.3e-5,
    request_ms=0.3,
)
IDLE_LOAD_MS = 0.2
"""What a step without missing rows spends in its load phase; a part of `step_ms`."""


def steps_of(profile: CostProfile, number: int, seed: int) -> list[MeasuredStep]:
    """Steps of a device that costs exactly this, of one request or several."""
    numbers, found = np.random.default_rng(seed), []
    for _ in range(number):
        requests = int(numbers.integers(1, 5))
        rows, start, candidates = (
            int(np.exp(numbers.uniform(0.0, np.log(top)))) for top in (2000, 2000, 2000)
        )
        missing = int(numbers.integers(0, 2) * numbers.integers(1, 2000))
        work = StepWork(
            requests=requests,
            rows=rows,
            pairs=rows * start + rows * (rows + 1) // 2,
            candidates=candidates,
            candidate_pairs=candidates * (start + rows),
            retrievals=int(numbers.integers(0, 2)),
            missing=missing,
            moves=0,
        )
        load_ms = (profile.round_trip_ms + profile.row_miss_ms * missing) if missing else 0.0
        compute_ms = (
            profile.step_ms
            + profile.request_ms * requests
            + profile.prefill_row_ms * work.rows
            + profile.attention_pair_ms * work.pairs
            + profile.candidate_ms * work.candidates
            + profile.candidate_pair_ms * work.candidate_pairs
            + profile.retrieval_ms * work.retrievals
        )
        found.append(MeasuredStep(work, load_ms + compute_ms, load_ms + IDLE_LOAD_MS))
    return found


def moves_of(profile: CostProfile) -> list[MeasuredStep]:
    work = StepWork(0, 0, 0, 0, 0, 0, 0, moves=500)
    return [MeasuredStep(work, 0.0, 500 * profile.row_copy_ms)] * 3


def costs(profile: CostProfile) -> dict[str, float]:
    return {name: one for name, one in asdict(profile).items() if not isinstance(one, str)}


def test_known_costs_are_found_again() -> None:
    found, errors = fit_profile(steps_of(KNOWN, 150, 1), moves_of(KNOWN), "known", "a test")
    assert costs(found) == pytest.approx(costs(KNOWN), rel=1e-6)
    assert errors.max() < 1e-9


def test_steps_that_something_else_disturbed_count_little() -> None:
    steps, numbers = steps_of(KNOWN, 300, 2), np.random.default_rng(3)
    disturbed = [
        one._replace(wall_ms=one.wall_ms * (4.0 if numbers.random() < 0.05 else 1.0))
        for one in steps
    ]
    found, errors = fit_profile(disturbed, moves_of(KNOWN), "known", "a test")
    assert costs(found) == pytest.approx(costs(KNOWN), rel=0.15)
    assert np.median(errors) < 0.03


def test_loads_that_are_hardly_longer_than_none_do_not_outweigh_the_others() -> None:
    quick = replace(KNOWN, round_trip_ms=0.01, row_miss_ms=0.001)
    numbers = np.random.default_rng(6)
    noisy = []
    for one in steps_of(quick, 300, 7):
        late = abs(float(numbers.normal(0.0, 0.02)))
        noisy.append(one._replace(wall_ms=one.wall_ms + late, load_ms=one.load_ms + late))
    found, _ = fit_profile(noisy, [], "known", "a test")
    assert found.row_miss_ms == pytest.approx(quick.row_miss_ms, rel=0.15)


def test_what_costs_nothing_is_never_below_nothing() -> None:
    free = replace(KNOWN, attention_pair_ms=0.0, request_ms=0.0, row_miss_ms=0.0)
    numbers = np.random.default_rng(4)
    noisy = [
        one._replace(wall_ms=one.wall_ms * numbers.uniform(0.9, 1.1))
        for one in steps_of(free, 150, 5)
    ]
    found, _ = fit_profile(noisy, [], "known", "a test")
    assert min(costs(found).values()) >= 0.0
    assert found.row_copy_ms == 0.0


@pytest.mark.parametrize("dialect", sorted(TOY_CONFIGS))
def test_every_kind_of_model_can_be_measured(dialect: str, tmp_path: Path) -> None:
    directory = write_toy_model(tmp_path, parse_model_config(TOY_CONFIGS[dialect], "toy"))
    engine = load_engine(toy_engine_config(directory), SystemClock())
    measured = measure_profile(engine, device="toy", source="a test", batches=40)
    assert measured.num_steps >= 40
    middle, late = measured.relative_errors
    assert 0.0 < middle < late
    # Its requests never were, as far as the engine's own books know.
    assert engine.core.scheduler.stats.steps == 0
    engine.core.check_nothing_leaked()
    engine.runner.close()


def test_the_command_writes_what_the_engine_reads(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    flags = ["--out", str(out), "--batches", "20", "--pool-bytes", "8MiB"]
    done = CliRunner().invoke(app, ["profile", str(BUNDLED_MODEL), *flags])
    assert done.exit_code == 0, done.stderr
    assert f"{out}: from " in done.stdout
    profile = load_cost_profile(out)
    assert profile.prefill_row_ms + profile.attention_pair_ms > 0.0
    # Its candidates meet the last row of a history and no other.
    assert profile.candidate_pair_ms == 0.0
    assert "hstu-ml-100k" in profile.source
    assert "mmap" in profile.device
    assert json.loads(out.read_text())["round_trip_ms"] == profile.round_trip_ms


def test_the_command_refuses_where_it_cannot_write(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "none" / "profile.json"):
        done = CliRunner().invoke(app, ["profile", str(BUNDLED_MODEL), "--out", str(out)])
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"--out: {out}" in done.stderr
