"""A soak: mixed traffic against a running server, and what it holds at quiet moments.

Users of the bundled model return with JSON and msgpack bodies, one request or several in a body;
clients hang up while they upload and while they wait; deadlines pass; input is bad in many ways or
too large; users are forgotten; the model is reloaded by POST and by SIGHUP. Memory, file
descriptors and threads of the front and of the engine core are sampled all the time. Now and then
the traffic pauses: then nothing may be in flight and no KV page held. The end is SIGTERM under
traffic, which must end with status 0.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --minutes 10 --json benchmarks/results/soak.json
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import msgspec
import numpy as np

from benchmarks.bundled_visits import MODEL_DIR
from benchmarks.process_samples import ProcessSample, core_pids, mib_per_minute, sample_server
from benchmarks.report import benchmark_parser, write_result
from benchmarks.server_process import ServerProcess, started
from benchmarks.soak_traffic import ADMIN_KEY, MAX_BODY_BYTES, Traffic

FLAGS = (
    *("--pool-bytes", "4MiB", "--emb-fraction", "0.05", "--max-num-batched-tokens", "512"),
    *("--max-body-bytes", str(MAX_BODY_BYTES), "--admin-key", ADMIN_KEY),
)
"""The pool is small, so that both tenants evict."""
WORKERS = 12
MAX_MIB_PER_MINUTE = 0.5
"""Slope of the anonymous memory over the second half that still counts as flat."""
MAX_MORE_FILES = 2
"""File descriptors at quiet moments of the second half beyond those of the first that do."""
_WARM_SECONDS = 20.0
"""An engine core's memory grows for so long after it began: pages are touched for the first time,
code is compiled."""
_QUIET_SECONDS = 1.5
"""The engine checks itself for leaks after a second without work."""
_SETTLE_SECONDS = 20.0
"""By then everything that was in flight must have ended, a replaced engine core among it."""
_GAUGE = re.compile(r"^helm:(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(slots=True)
class Quiet:
    """What was held while nobody asked."""

    seconds: float
    settled_after: float
    """Seconds until nothing was held; the limit where that never came."""
    held: dict[str, float]
    """What was held then; all zero in order."""
    front_files: int
    core_files: int
    front_threads: int
    core_threads: int


@dataclass(slots=True)
class Soak:
    """One run against one server."""

    server: ServerProcess
    seconds: float
    cycle_seconds: float
    sample_seconds: float
    reload_every: int
    """Cycles from one reload to the next."""
    seed: int
    samples: list[ProcessSample] = field(default_factory=list)
    quiets: list[Quiet] = field(default_factory=list)
    reloads: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    """As last scraped."""
    exit_status: int | None = None
    _started: float = field(default_factory=time.monotonic)

    async def run(self) -> Traffic:
        """Traffic, pauses and reloads until the time is up; then SIGTERM under traffic."""
        traffic = Traffic(self.server.address, WORKERS, self.seed)
        sampling = asyncio.create_task(self._sample())
        cycle = 0
        # Both ways to reload are taken, however short the time.
        while self._elapsed() < self.seconds or len(self.reloads) < 2:
            traffic.resume()
            if cycle % self.reload_every == self.reload_every - 1:
                await self._reload(traffic)
            await asyncio.sleep(self.cycle_seconds)
            await traffic.pause()
            await self._be_quiet(traffic)
            cycle += 1
        traffic.resume()
        await asyncio.sleep(self.cycle_seconds)
        sampling.cancel()
        traffic.draining = True
        self.exit_status = await asyncio.to_thread(self.server.stop)
        await traffic.stop()
        return traffic

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    async def _sample(self) -> None:
        while True:
            self.samples += sample_server(self.server.process.pid, self._elapsed())
            await asyncio.sleep(self.sample_seconds)

    async def _scrape(self, traffic: Traffic) -> dict[str, float]:
        _, page = await traffic.get("/metrics")
        self.metrics = {name: float(value) for name, value in _GAUGE.findall(page.decode())}
        return self.metrics

    async def _reload(self, traffic: Traffic) -> None:
        """By POST and by SIGHUP in turns; under traffic."""
        how = ("POST", "SIGHUP")[len(self.reloads) % 2]
        before = (await self._scrape(traffic))["model_reloads_total"]
        if how == "POST":
            status, answer = await traffic.send("/v1/admin/reload", b"{}", admin=True)
            if status != 200:
                traffic.problems.append(f"reload: status {status}: {answer!r}")
        else:
            self.server.process.send_signal(signal.SIGHUP)
            give_up = time.monotonic() + 6 * _SETTLE_SECONDS
            while self.metrics["model_reloads_total"] == before and time.monotonic() < give_up:
                await asyncio.sleep(0.2)
                await self._scrape(traffic)
        await self._scrape(traffic)
        if self.metrics["model_reloads_total"] != before + 1:
            traffic.problems.append(f"reload by {how}: the model was not replaced")
        self.reloads.append(how)

    async def _be_quiet(self, traffic: Traffic) -> None:
        """Nobody asks: after a moment nothing may be held."""
        began = time.monotonic()
        while True:
            held = await self._held(traffic)
            waited = time.monotonic() - began
            if not any(held.values()) or waited > _SETTLE_SECONDS:
                break
            await asyncio.sleep(0.05)
        await asyncio.sleep(_QUIET_SECONDS)
        now = {one.role: one for one in sample_server(self.server.process.pid, self._elapsed())}
        front, core = now["front"], now.get("core", now["front"])
        files, threads = (front.files, core.files), (front.threads, core.threads)
        self.quiets.append(Quiet(self._elapsed(), waited, held, *files, *threads))
        if any(held.values()):
            traffic.problems.append(f"at {self._elapsed():.0f} s, without traffic: {held}")

    async def _held(self, traffic: Traffic) -> dict[str, float]:
        metrics = await self._scrape(traffic)
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        _, load = await traffic.get("/load")
        cores = len(core_pids(self.server.process.pid))
        return {
            **{name: metrics[name] for name in names},
            "server_load": msgspec.json.decode(load)["server_load"],
            "replaced_engine_cores": cores - 1,
        }


def flatness(soak: Soak, judge_memory: bool, problems: list[str]) -> dict[str, Any]:
    """Memory, file descriptors and threads, and whether they stay; what does not is a problem.

    Args:
        soak: a finished run.
        judge_memory: whether the run was long enough for a slope to mean anything.
        problems: what is wrong is added here.
    """
    end = soak.samples[-1].seconds
    born: dict[int, float] = {}
    for sample in soak.samples:
        born.setdefault(sample.pid, sample.seconds)
    flat: dict[str, Any] = {"max_mib_per_minute": MAX_MIB_PER_MINUTE, "memory_judged": judge_memory}
    for role in ("front", "core"):
        samples = [one for one in soak.samples if one.role == role]
        second_half = [
            one
            for one in samples
            if one.seconds > end / 2 and one.seconds > born[one.pid] + _WARM_SECONDS
        ]
        slope = mib_per_minute(second_half)
        if judge_memory and (slope is None or slope > MAX_MIB_PER_MINUTE):
            problems.append(f"{role}: memory grows by {slope} MiB a minute")
        flat[role] = {
            "mib_per_minute": slope,
            "anonymous_mib": _around([one.anonymous_mib for one in second_half or samples]),
            "pss_mib": _around([one.pss_mib for one in second_half or samples]),
            "files": _halves(soak.quiets, f"{role}_files", problems),
            "threads": _halves(soak.quiets, f"{role}_threads", problems),
            "processes": len({one.pid for one in samples}),
        }
    return flat


def _around(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.0, 0.5, 1.0]).round(2).tolist()
    return {"median": middle, "least": low, "most": high}


def _halves(quiets: Sequence[Quiet], name: str, problems: list[str]) -> dict[str, int]:
    """The most at quiet moments of either half."""
    counted = [getattr(quiet, name) for quiet in quiets]
    middle = (len(counted) + 1) // 2
    first, second = max(counted[:middle]), max(counted[middle:], default=counted[-1])
    if second > first + MAX_MORE_FILES:
        problems.append(f"{name}: {second} in the second half, {first} in the first")
    return {"first_half": first, "second_half": second}


def figures(soak: Soak, traffic: Traffic, judge_memory: bool) -> dict[str, Any]:
    """What the result file says of a run."""
    problems = traffic.problems
    flat = flatness(soak, judge_memory, problems)
    if soak.exit_status:
        problems.append(f"the server ended with status {soak.exit_status}")
    if soak.metrics["engine_restarts_total"]:
        problems.append("an engine core died or hung")
    counts: dict[str, dict[str, int]] = {}
    for (kind, status), number in sorted(traffic.counts.items(), key=str):
        counts.setdefault(kind, {})[str(status)] = number
    return {
        "seed": soak.seed,
        "seconds": soak.samples[-1].seconds,
        "requests": sum(traffic.counts.values()),
        "counts": counts,
        "reloads": soak.reloads,
        "quiet_moments": len(soak.quiets),
        "longest_until_nothing_held_s": max(quiet.settled_after for quiet in soak.quiets),
        "flat": flat,
        "kv_evictions": soak.metrics["kv_cache_evictions_total"],
        "emb_evictions": soak.metrics["emb_cache_evictions_total"],
        "engine_restarts": soak.metrics["engine_restarts_total"],
        "exit_status": soak.exit_status,
        "problems": problems[:50],
        "num_problems": len(problems),
    }


def main() -> None:
    """One run for each seed; ends with status 1 if anything was wrong."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each run; --quick: 8 s")
    arguments = parser.parse_args()
    quick = arguments.quick
    seconds = 8.0 if quick else 60.0 * arguments.minutes
    runs = []
    for seed in arguments.seeds:
        with started(MODEL_DIR, *FLAGS) as server:
            soak = Soak(
                server=server,
                seconds=seconds,
                cycle_seconds=0.5 if quick else 10.0,
                sample_seconds=0.25 if quick else 1.0,
                reload_every=2 if quick else 5,
                seed=seed,
            )
            traffic = asyncio.run(soak.run())
        # Half a minute of warm-up after each reload leaves little of a shorter run to judge.
        runs.append(figures(soak, traffic, judge_memory=seconds >= 180.0))
    common = {"server_flags": list(FLAGS), "workers": WORKERS, "runs": runs}
    write_result(arguments.json, common, arguments.seeds)
    problems = [problem for run in runs for problem in run["problems"]]
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
