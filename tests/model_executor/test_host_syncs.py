"""A step asks the device for nothing before its end: the host enqueues it whole, and waits once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helm_engine.clock import VirtualClock
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.protocol import parse_request
from helm_engine.sample_request import sample_request
from model_executor.attention.torch_reference import TorchReferenceAttention
from model_executor.model_runner import PhaseTimer
from model_executor.staged_link import StagedLink
from model_executor.step import SchedulerOutput
from tests.model_executor.fake_copies import FakeCopies
from tests.model_executor.host_syncs import HostSyncs, count_reads
from tests.toy_models import TOY_CONFIGS, toy_config, toy_engine_config, write_toy_model


class PromptCopies(FakeCopies):
    """Copies at once, as nobody waits."""

    def copy(self, traffic: Any, source: torch.Tensor, target: torch.Tensor) -> Any:
        target.copy_(source)
        return super().copy(traffic, source, target)


def load(directory: Path, dialect: str) -> LoadedEngine:
    """An engine that goes the way of a GPU as far as a CPU can: rings, reference attention."""
    path = write_toy_model(directory, toy_config(dialect))
    engine = load_engine(toy_engine_config(path, max_num_batched_tokens=100), VirtualClock())
    runner = engine.runner
    runner._attention = TorchReferenceAttention()
    runner.loader._link = StagedLink(PromptCopies(), runner.model.config.row_dim)
    return engine


def ask(engine: LoadedEngine, name: str, items: list[int], candidates: list[int] | None) -> None:
    body = sample_request(engine.served.model_config, items, list(range(len(items))), candidates)
    body["user"] = name
    request = engine.processor.process(parse_request(body), f"{name}-{len(items)}", 0.0).request
    engine.core.add_request(request)


def counted(
    engine: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> tuple[Counter[str], list[SchedulerOutput]]:
    """Runs what was asked; the waits of its steps up to the end, where the timings are read."""
    counts: Counter[str] = Counter()
    steps: list[SchedulerOutput] = []
    execute, result = engine.runner.execute, PhaseTimer.result
    with monkeypatch.context() as patch:

        def watched(step: SchedulerOutput) -> Any:
            steps.append(step)
            syncs = HostSyncs()
            # From the end of a step on, all that is read has come.
            patch.setattr(PhaseTimer, "result", lambda timer: _leave(syncs, timer))
            syncs.__enter__()  # type: ignore[no-untyped-call]
            try:
                return execute(step)
            finally:
                counts.update(syncs.counts)

        def _leave(syncs: HostSyncs, timer: PhaseTimer) -> Any:
            syncs.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            return result(timer)

        patch.setattr(engine.runner, "execute", watched)
        count_reads(patch, counts)
        engine.core.run_until_idle()
    return counts, steps


@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_no_step_waits_before_its_end(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tmp_path, dialect)
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 60, 24).tolist() for _ in range(3)]
    retrieves: list[list[int] | None] = [None] if engine.served.can_retrieve else []
    for length in (9, 9, 20):  # New, cached, grown.
        for place, history in enumerate(histories):
            for kind in [[5, 6, 7, 59], *retrieves]:
                ask(engine, f"user-{place}-{kind is None}", history[:length], kind)
        counts, steps = counted(engine, monkeypatch)
        assert (steps and any(step.rows.num_missing for step in steps)) or length == 9
        assert not counts
    engine.close()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x),
        lambda x: x.masked_select(x > 0),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.to("cpu"),
        lambda x: bool((x > 0).all()),
        lambda x: torch.repeat_interleave(torch.ones(3, dtype=torch.int64)),
        lambda x: x.index_put_((x > 0,), torch.tensor(1.0)),
    ],
)
def test_the_counter_finds_what_waits(
    wait: Callable[[torch.Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3)
    with monkeypatch.context() as patch, HostSyncs() as syncs:
        count_reads(patch, syncs.counts)
        x.to("cpu", non_blocking=True)
        x.index_select(0, torch.tensor([1])).sum()
        assert not syncs.counts
        wait(x)
    assert syncs.counts.total() >= 1
