"""The largest steps through the real runner, and the pool that they leave room for."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from block_manager.pool_layout import plan_layout, smallest_pool
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, ExecutorConfig, RequestLimits
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.input_processor import new_user_key
from helm_engine.largest_steps import largest_steps
from helm_engine.pool_sizing import device_budget, size_pool
from helm_engine.protocol import parse_request
from helm_engine.sample_request import sample_request
from model_executor.capabilities import StepRules, step_rules
from model_executor.device_budget import DeviceBudget
from model_executor.exceptions import DeviceMemoryError
from model_executor.memory_meter import measure_workspace
from model_executor.model_config import StuConfig
from model_executor.step import ModelOutput, SchedulerOutput
from tests.toy_models import TOY_CONFIGS, toy_config, toy_engine_config, write_toy_model

TOKENS = 40


class AllocatorMeter:
    """Counts what torch's allocator of the CPU hands out and takes back."""

    def __init__(self) -> None:
        self._profile: Any = None

    def begin(self) -> None:
        gc.collect()  # What earlier tests left must not be freed meanwhile.
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def most_added(self) -> int:
        self._profile.stop()
        events = self._profile.profiler.kineto_results.events()
        found = [event for event in events if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(found, key=lambda one: one.start_ns())]
        return int(np.cumsum([0, *changes]).max())


class Fixed:
    def begin(self) -> None:
        pass

    def most_added(self) -> int:
        return 5000


def engine_of(tmp_path: Path, dialect: str, **settings: Any) -> tuple[LoadedEngine, StepRules]:
    path = write_toy_model(tmp_path, toy_config(dialect))
    config = replace(
        toy_engine_config(path, max_num_batched_tokens=TOKENS, max_num_seqs=6, num_pages=40),
        executor=ExecutorConfig(attention_backend="torch"),
        **settings,
    )
    engine = load_engine(config, SystemClock())
    served = engine.served
    return engine, step_rules(served.model_config, served.capabilities)


def steps_of(engine: LoadedEngine, rules: StepRules) -> list[SchedulerOutput]:
    return largest_steps(engine.served, engine.served.input_processor(new_user_key()), rules)


@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_no_step_of_real_traffic_takes_more_than_the_largest_steps(
    tmp_path: Path, dialect: str
) -> None:
    engine, rules = engine_of(tmp_path, dialect)
    steps = steps_of(engine, rules)
    assert max(map(num_tokens, steps)) == TOKENS
    workspace = measure_workspace(engine.runner, steps, AllocatorMeter())
    assert 0 < workspace <= engine.served.activation_bound
    seen: list[int] = []
    core, execute = engine.core, engine.runner.execute

    def metered(step: SchedulerOutput) -> ModelOutput:
        meter = AllocatorMeter()
        meter.begin()
        output = execute(step)
        seen.append(meter.most_added())
        return output

    engine.runner.execute = metered  # type: ignore[method-assign]
    rng = np.random.default_rng(0)
    model = engine.served.model_config
    most = min(60, model.max_candidates) if isinstance(model, StuConfig) else 60
    for number in range(12):
        length, candidates = int(rng.integers(1, 25)), int(rng.integers(0, most + 1))
        drawn = (model.first_item_id + rng.integers(0, 60, length + candidates)).tolist()
        asked = drawn[length:] or (None if engine.served.can_retrieve else drawn[:1])
        body = sample_request(model, drawn[:length], list(range(length)), asked)
        prepared = engine.processor.process(parse_request({"user": "u", **body}), str(number), 0.0)
        core.add_request(prepared.request)
        if number % 4 == 3:
            assert all(one.error is None for one in core.run_until_idle())
    assert seen
    assert max(seen) <= workspace


def num_tokens(step: SchedulerOutput) -> int:
    return sum(one.num_rows + one.num_candidates for one in step.requests)


def test_the_largest_steps_are_those_of_the_settings(tmp_path: Path) -> None:
    engine, rules = engine_of(tmp_path, "research", limits=RequestLimits(max_candidates=30))
    chunk, candidates, many = steps_of(engine, rules)
    # A longest history, 24 events, and the end of one; 38 candidates, 30 of them of one request.
    assert [(one.start, one.num_rows) for one in chunk.requests] == [(0, 24), (10, 14)]
    assert [(one.num_rows, one.num_candidates) for one in candidates.requests] == [(1, 30), (1, 8)]
    assert [(one.num_rows, one.task is not None) for one in many.requests] == [(6, True)] * 6


def test_the_pool_gets_what_is_left_and_the_engine_serves_from_it(tmp_path: Path) -> None:
    engine, rules = engine_of(tmp_path, "research")
    served = engine.served
    sizes = {
        "kv_bytes_per_token": served.model_config.kv_elements_per_token * 4,
        "row_bytes": served.model_config.row_dim * 4,
        "max_context_tokens": served.model_config.max_context_tokens,
        "staging_rows": TOKENS,
    }
    least = plan_layout(smallest_pool(served.config.pool, **sizes), **sizes)
    engine.runner.replace_pool(least)
    small = replace(served, layout=least, memory=engine.runner.memory)
    left = 100_000
    budget = DeviceBudget("cpu", (served.memory.weights + 5000 + left) * 2, 1 << 40, 0.5)
    sized = size_pool(small, engine.runner, rules, budget, Fixed(), partial(plan_layout, **sizes))
    assert sized.config.pool.pool_bytes == left
    assert sized.layout == plan_layout(sized.config.pool, **sizes)
    assert sized.workspace == 5000
    assert sized.memory == engine.runner.memory
    assert left - sized.layout.page_bytes < sized.layout.total_bytes <= left
    assert sized.memory.total + 5000 <= budget.share
    assert engine.runner.arena.nbytes == sized.layout.total_bytes
    tight = replace(budget, total=budget.total - 2 * (left - least.total_bytes) - 2)
    with pytest.raises(DeviceMemoryError, match="for the smallest pool"):
        size_pool(small, engine.runner, rules, tight, Fixed(), partial(plan_layout, **sizes))


def test_a_step_too_large_for_the_device_is_told_with_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, rules = engine_of(tmp_path, "research")

    def fails(step: SchedulerOutput) -> ModelOutput:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(engine.runner, "execute", fails)
    budget = DeviceBudget("cpu", 1 << 40, 1 << 40, 0.5)
    with pytest.raises(DeviceMemoryError, match=r"a step of 40 tokens .* max_num_batched_tokens"):
        size_pool(
            engine.served, engine.runner, rules, budget, Fixed(), lambda _: engine.served.layout
        )


def test_the_budget_is_that_of_the_gpu_and_of_those_that_share_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (900, 1000))
    gpu = torch.device("cuda", 0)
    own = ExecutorConfig(device="cuda", num_engines=3, gpu_memory_utilization=0.6)
    shared = replace(own, device="cuda:0")
    assert device_budget(own, gpu) == DeviceBudget("cuda:0", 1000, 900, 0.6, 1)
    assert device_budget(shared, gpu) == DeviceBudget("cuda:0", 1000, 900, 0.6, 3)
    assert device_budget(replace(own, gpu_memory_utilization=None), gpu) is None
    assert device_budget(own, torch.device("cpu")) is None
    with pytest.raises(DeviceMemoryError, match=r"lower it to 0\.9"):
        device_budget(replace(own, gpu_memory_utilization=0.95), gpu)


@pytest.mark.parametrize("share", [0.0, 1.01, -1.0, float("nan")])
def test_a_share_is_above_0_and_at_most_1(share: float) -> None:
    with pytest.raises(ValueError, match="gpu_memory_utilization: must be"):
        ExecutorConfig(gpu_memory_utilization=share)


def test_on_a_cpu_the_pool_has_its_default_size(tmp_path: Path) -> None:
    path = write_toy_model(tmp_path, toy_config("research"))
    executor = ExecutorConfig(gpu_memory_utilization=0.9)
    engine = load_engine(EngineConfig(path, executor=executor), SystemClock())
    assert engine.served.workspace is None
    assert engine.served.config.pool.pool_bytes == 64 << 20
