"""What a real engine did under load, in real time, done once more without its device."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from block_manager.pool_layout import PoolConfig
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, HostTierConfig, SchedulerConfig
from helm_engine.engine_loader import load_engine
from helm_engine.exceptions import HelmError
from helm_engine.request import Request
from helm_engine.scheduler import Scheduler, build_scheduler
from helm_engine.simulator.open_loop import RealTimer, offer
from helm_engine.simulator.replay import Moved, RecordingCore, Stepped, replay
from helm_engine.simulator.trace import RULES, make_trace
from tests.simulator.small import regime, setting, workload
from tests.simulator.test_simulation import toy_ranking_model
from tests.toy_models import write_toy_model


class Kept:
    """An audience that keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def ended(self, request: Request, now: float) -> None:
        self.requests.append(request)

    def refused(self, request: Request, error: HelmError) -> None:
        raise error


def hits(request: Request) -> tuple[object, ...]:
    return (
        request.request_id,
        request.cached_tokens,
        request.rows_requested,
        request.rows_resident,
        request.first_scheduled,
        request.finished_at,
        request.timings_ms,
    )


def test_a_recorded_engine_has_the_same_hits_when_it_is_replayed(tmp_path: Path) -> None:
    directory = write_toy_model(tmp_path / "toy", toy_ranking_model())
    config = EngineConfig(
        directory,
        pool=PoolConfig(pool_bytes=1 << 18, emb_fraction=0.3, block_tokens=8),
        scheduler=SchedulerConfig(max_num_batched_tokens=96, max_num_seqs=6),
        host_tier=HostTierConfig(refill_bytes_per_second=1 << 20),
    )
    engine = load_engine(config, SystemClock())
    trace = make_trace(
        workload(
            regime(seconds=2.0),
            warm_up_s=0.0,
        ),
        7,
        setting=setting(requests_per_s=250.0),
    )

    def scheduler() -> Scheduler:
        return build_scheduler(
            config.scheduler,
            engine.served.layout,
            engine.served.model_config.num_rows,
            RULES,
            refill=config.host_tier.refill,
        )

    real = scheduler()
    core, audience = RecordingCore(real, engine.runner, SystemClock()), Kept()
    coming = [
        (when, lambda place=place: trace.request(place))
        for place, when in enumerate(trace.arrivals.tolist())
    ]
    # The last comes when all requests are answered, and there is time for it on a slow machine too.
    moves = [
        (when, lambda share=share: core.set_target(share))
        for when, share in ((0.5, 0.7), (1.0, 0.1), (2.5, 0.1), (2.6, 0.7), (3.2, 0.7))
    ]
    offer(core, RealTimer(), coming, audience, moves)
    arrivals = {request.request_id: request.arrival for request in audience.requests}

    def made(request_id: str) -> Request:
        return replace(trace.request(int(request_id)), arrival=arrivals[request_id])

    simulated = scheduler()
    again = replay(core.calls, simulated, made)
    assert [hits(one) for one in again] == [hits(one) for one in audience.requests]
    assert simulated.stats == real.stats
    np.testing.assert_array_equal(simulated.emb.slot_of_row, real.emb.slot_of_row)
    np.testing.assert_array_equal(simulated.kv.pool.free_block_ids(), real.kv.pool.free_block_ids())
    simulated.check_integrity()
    # All that may go wrong has happened: a queue, chunks, moves, refills, hits and misses.
    assert len(again) == len(trace) > 400
    kinds = Counter(type(call) for call in core.calls)
    assert kinds[Moved] == 5
    assert any(isinstance(call, Stepped) and call.refilled for call in core.calls)
    assert max(one.first_scheduled - one.arrival for one in again if one.first_scheduled) > 0.001
    assert 0 < real.stats.prefix_hits < real.stats.prefix_queries
    assert 0 < real.stats.row_hits < real.stats.row_queries
    assert real.boundary.num_moved_pages > 40
