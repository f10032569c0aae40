"""One call of `bench`: makes the requests, warms the server up, and puts each load on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from rich.progress import Progress

from helm_engine.bench.load import (
    Outcome,
    Watch,
    closed_loop,
    connected,
    open_loop,
    poisson_arrivals,
)
from helm_engine.bench.report import Figures, figures_of
from helm_engine.bench.target import Target

MAX_PREPARED_BYTES = 4 << 30
_WARM_UP_CONCURRENCY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which loads, and for how long each."""

    rates: tuple[float, ...] = ()
    """Requests/s, one run after the other, open loop; empty = closed loop."""
    concurrency: int = 1
    """Requests in flight in the closed loop."""
    requests: int | None = None
    duration_s: float | None = None
    """One of the two."""
    warm_up: int = 0
    """Requests sent and not counted before the first run."""
    timeout_s: float = 30.0
    deadline_ms: float | None = None
    seed: int = 0


def run_plan(
    target: Target, bodies: Iterator[bytes], plan: Plan, api_key: str | None, progress: Progress
) -> list[Figures]:
    """Carries the plan out; the stream of bodies goes on from one load to the next.

    Raises:
        ValueError: the server refuses the first request, or the requests take too much memory.
    """
    warm_up = max(1, plan.warm_up)
    asyncio.run(_warm_up(target, bodies, warm_up, plan, api_key, progress))
    if not plan.rates:
        return [asyncio.run(_closed(target, bodies, plan, api_key, progress))]
    return [
        asyncio.run(_open(target, bodies, plan, rate, api_key, progress)) for rate in plan.rates
    ]


async def _warm_up(
    target: Target,
    bodies: Iterator[bytes],
    number: int,
    plan: Plan,
    api_key: str | None,
    progress: Progress,
) -> None:
    watch = _watch(progress, "warming up", number)
    async with connected(target.address, api_key, plan.timeout_s, watch) as ask:
        (first,) = await closed_loop(ask, islice(bodies, 1), 1)
        if first.status != "200":
            # All would end like this one.
            raise ValueError(f"{target.address}: {first.message or first.status}")
        await closed_loop(ask, islice(bodies, number - 1), _WARM_UP_CONCURRENCY)


async def _closed(
    target: Target, bodies: Iterator[bytes], plan: Plan, api_key: str | None, progress: Progress
) -> Figures:
    asked: Iterator[bytes] = bodies
    if plan.requests is not None:
        asked = iter(_prepared(bodies, plan.requests, progress))
    watch = _watch(progress, f"{plan.concurrency} at once", plan.requests)
    async with connected(target.address, api_key, plan.timeout_s, watch) as ask:
        started = time.perf_counter()
        outcomes = await closed_loop(ask, asked, plan.concurrency, plan.duration_s)
    return figures_of(
        outcomes,
        rate=None,
        concurrency=plan.concurrency,
        deadline_ms=plan.deadline_ms,
        started=started,
    )


async def _open(
    target: Target,
    bodies: Iterator[bytes],
    plan: Plan,
    rate: float,
    api_key: str | None,
    progress: Progress,
) -> Figures:
    arrivals = poisson_arrivals(rate, plan.requests, plan.duration_s, plan.seed)
    prepared = _prepared(bodies, len(arrivals), progress)
    watch = _watch(progress, f"{rate:g}/s", len(arrivals))
    async with connected(target.address, api_key, plan.timeout_s, watch) as ask:
        started = time.perf_counter()
        outcomes = await open_loop(ask, prepared, arrivals)
    return figures_of(
        outcomes, rate=rate, concurrency=None, deadline_ms=plan.deadline_ms, started=started
    )


def _prepared(bodies: Iterator[bytes], number: int, progress: Progress) -> list[bytes]:
    """Bodies made ahead, so that making them does not compete with sending them."""
    prepared: list[bytes] = []
    size = 0
    task = progress.add_task("making requests", total=number)
    for body in islice(bodies, number):
        prepared.append(body)
        size += len(body)
        if size > MAX_PREPARED_BYTES:
            raise ValueError(
                f"the {number} requests of a run take more than {MAX_PREPARED_BYTES} bytes, "
                f"{len(body)} each; ask for fewer with --requests or --duration"
            )
        progress.advance(task)
    progress.remove_task(task)
    return prepared


def _watch(progress: Progress, what: str, total: int | None) -> Watch:
    task = progress.add_task(what, total=total)

    def watch(_: Outcome) -> None:
        progress.advance(task)

    return watch
