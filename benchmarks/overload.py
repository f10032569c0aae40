"""Five times the load that a server can carry: how much of its goodput is left.

Goodput is the number of requests answered within the deadline, per second, from the time they were
to be sent. A sweep of open-loop rates finds where it peaks; then peak and five times its rate take
turns on one server, and each round gives a ratio. The server must keep its queue bounded, refuse
the rest at once with 429 and Retry-After, answer what it took in time or with 504, and answer
everything again when the storm is over. Engine and load generator compute on one thread each.

    python benchmarks/overload.py --json benchmarks/results/overload.json
"""

from __future__ import annotations

import multiprocessing
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np

from benchmarks.open_loop import HUNG_UP, Outcome, Storm, answer_each, offer
from benchmarks.overload_users import Seats, bundled_stream, mini_stream
from benchmarks.process_samples import core_pids, cpu_seconds
from benchmarks.report import benchmark_parser, write_result
from benchmarks.returning_visits import model_dir
from benchmarks.server_process import ServerProcess, started

OVERLOAD = 5.0
MIN_RATIO = 0.9
"""Of the goodput at the peak."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
"""On two cores: the engine has one, the front and the load generator share the other."""
AFTERWARDS = 20
"""Requests that are sent one after the other when a storm is over."""
_QUANTILES = (0.5, 0.99)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is served and how it is loaded."""

    workload: str
    model_dir: Path
    flags: tuple[str, ...]
    max_num_seqs: int
    max_num_waiting: int
    seats: int
    """Users who may come at any time."""
    deadline_ms: float
    """What counts as good."""
    way_ms: float
    """Left out of the `deadline_ms` that is sent, for the way there and back."""
    shares: tuple[float, ...]
    """Rates of the sweep, of the capacity of a closed loop."""
    phase_seconds: float
    rounds: int

    @property
    def limit(self) -> int:
        """Requests that wait at most: between two steps those that will run next wait too."""
        return self.max_num_seqs + self.max_num_waiting

    @property
    def all_flags(self) -> tuple[str, ...]:
        """Of `helm-engine serve`."""
        seqs, waiting = str(self.max_num_seqs), str(self.max_num_waiting)
        return (*self.flags, "--max-num-seqs", seqs, "--max-num-waiting", waiting)


def full_plan() -> Plan:
    """The small DLRMv3: the engine is the bottleneck, not the client."""
    return Plan(
        workload="abs_640",
        model_dir=model_dir("abs", 640),
        flags=("--pool-bytes", "1GiB", "--max-num-batched-tokens", "4096"),
        # A longer queue would only make answers late: it is what is answered within a deadline.
        max_num_seqs=8,
        max_num_waiting=8,
        seats=128,
        deadline_ms=200.0,
        way_ms=20.0,
        shares=(0.6, 0.8, 1.0, 1.2, 1.4),
        phase_seconds=5.0,
        rounds=6,
    )


def quick_plan() -> Plan:
    """The bundled model, slowed down by many small steps."""
    return Plan(
        workload="bundled",
        model_dir=REPOSITORY / "examples" / "models" / "hstu-ml-100k",
        flags=("--pool-bytes", "32MiB", "--max-num-batched-tokens", "16"),
        max_num_seqs=4,
        max_num_waiting=8,
        seats=16,
        deadline_ms=400.0,
        way_ms=20.0,
        shares=(0.6, 0.9),
        phase_seconds=1.5,
        rounds=2,
    )


@dataclass(slots=True)
class Loading:
    """One server under load."""

    plan: Plan
    server: ServerProcess
    seats: Seats
    pool: ProcessPoolExecutor
    rng: np.random.Generator
    problems: list[str]

    def capacity(self) -> float:
        """Answers per second of a closed loop, after every user came twice."""
        bodies = [body for _ in range(5) for body in self.seats.take_all()]
        first = 2 * self.plan.seats
        at_once = self.plan.limit * 3 // 4
        for part in (bodies[:first], bodies[first:]):
            rate = self.pool.submit(answer_each, self.server.address, part, at_once).result()
        return rate

    def phase(self, rate: float) -> dict[str, Any]:
        """Poisson arrivals at a rate, and what came of them."""
        seconds = self.plan.phase_seconds
        number = self.rng.poisson(rate * seconds)
        times = np.sort(self.rng.uniform(0.0, seconds, number)).tolist()
        seats = self.rng.integers(0, self.plan.seats, number).tolist()
        storm = Storm(
            address=self.server.address,
            seats=self.seats.coming(),
            deadline_ms=self.plan.deadline_ms - self.plan.way_ms,
            arrivals=list(zip(times, seats, strict=True)),
        )
        before = self._cpu_seconds()
        outcome = self.pool.submit(offer, storm).result()
        used = {role: end - before[role] for role, end in self._cpu_seconds().items()}
        used["client"] = outcome.client_cpu_seconds
        self.seats.answered(outcome.answered)
        self._judge(outcome)
        shares = {role: round(spent / seconds, 2) for role, spent in used.items()}
        return {**self._figures(rate, outcome), "cpu_shares": shares}

    def _cpu_seconds(self) -> dict[str, float]:
        front = self.server.process.pid
        return {"front": cpu_seconds(front), "core": sum(map(cpu_seconds, core_pids(front)))}

    def _judge(self, outcome: Outcome) -> None:
        strange = set(outcome.statuses) - {200, 429, 504}
        if strange:
            self.problems.append(f"statuses {strange}; {HUNG_UP} is a broken connection")
        if outcome.without_retry_after:
            self.problems.append(f"{outcome.without_retry_after} refusals without Retry-After")
        if outcome.most_waiting > self.plan.limit:
            self.problems.append(f"{outcome.most_waiting} requests waited")

    def _figures(self, rate: float, outcome: Outcome) -> dict[str, Any]:
        statuses = np.array(outcome.statuses)
        latencies = np.array(outcome.latencies) * 1e3
        in_time = latencies <= self.plan.deadline_ms
        seconds = self.plan.phase_seconds
        return {
            "offered_per_s": round(rate, 1),
            "goodput_per_s": round(int(np.sum((statuses == 200) & in_time)) / seconds, 1),
            "statuses": {
                str(status): number for status, number in Counter(outcome.statuses).items()
            },
            "answered_late": int(np.sum((statuses == 200) & ~in_time)),
            **{
                f"ms_of_{status}": _quantiles(latencies[statuses == status])
                for status in (200, 429, 504)
            },
            "sent_late_ms": _quantiles(np.array(outcome.lags) * 1e3),
            "most_waiting": outcome.most_waiting,
        }

    def answers_again(self) -> None:
        """One request after the other, each of which must be answered."""
        bodies = list(islice(self.seats.take_all(), AFTERWARDS))
        try:
            self.pool.submit(answer_each, self.server.address, bodies, 1).result()
        except RuntimeError as error:
            self.problems.append(f"after the storm: {error}")


def _quantiles(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float] | None:
    if not len(values):
        return None
    return {
        f"p{share * 100:.0f}": round(float(np.quantile(values, share)), 1) for share in _QUANTILES
    }


def run(plan: Plan, seed: int, problems: list[str]) -> dict[str, Any]:
    """The sweep, then rounds of peak and overload on the same server."""
    make_stream = {"abs_640": mini_stream, "bundled": bundled_stream}[plan.workload]
    stream = make_stream(plan.seats, seed)
    spawn = multiprocessing.get_context("spawn")
    with (
        started(plan.model_dir, *plan.all_flags, environment=ENVIRONMENT) as server,
        ProcessPoolExecutor(1, spawn) as pool,
    ):
        rng = np.random.default_rng(seed)
        loading = Loading(plan, server, Seats(stream, plan.seats), pool, rng, problems)
        capacity = loading.capacity()
        sweep = [loading.phase(share * capacity) for share in plan.shares]
        best = max(sweep, key=lambda phase: float(phase["goodput_per_s"]))["offered_per_s"]
        rounds = []
        for _ in range(plan.rounds):
            peak = loading.phase(best)
            overload = loading.phase(OVERLOAD * best)
            loading.answers_again()
            ratio = overload["goodput_per_s"] / max(peak["goodput_per_s"], 1e-9)
            rounds.append({"ratio": ratio, "peak": peak, "overload": overload})
        status = server.stop()
    if status:
        problems.append(f"the server ended with status {status}")
    return {
        "seed": seed,
        "closed_loop_per_s": round(capacity, 1),
        "sweep": sweep,
        "peak_rate_per_s": best,
        "rounds": rounds,
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ranges over the rounds of all runs."""
    rounds = [one for run in runs for one in run["rounds"]]
    ratios = [one["ratio"] for one in rounds]
    storms = [one["overload"] for one in rounds]
    refusals = [storm["ms_of_429"]["p99"] for storm in storms if storm["ms_of_429"]]
    answered = sum(storm["statuses"].get("200", 0) for storm in storms)
    return {
        "goodput_ratio": float(np.median(ratios)),
        "goodput_ratio_range": [min(ratios), max(ratios)],
        "peak_goodput_per_s": float(np.median([one["peak"]["goodput_per_s"] for one in rounds])),
        "overload_goodput_per_s": float(np.median([one["goodput_per_s"] for one in storms])),
        "refused_p99_ms": float(np.median(refusals)) if refusals else None,
        "answered_late_share": sum(one["answered_late"] for one in storms) / max(answered, 1),
        "most_waiting": max(one["most_waiting"] for one in storms),
    }


def main() -> None:
    """One run for each seed; ends with status 1 if anything was wrong."""
    arguments = benchmark_parser(__doc__).parse_args()
    plan = quick_plan() if arguments.quick else full_plan()
    problems: list[str] = []
    runs = [run(plan, seed, problems) for seed in arguments.seeds]
    figures = summary(runs)
    # A second and a half on a busy machine says nothing of how fast anything is.
    if not arguments.quick and figures["goodput_ratio"] < MIN_RATIO:
        problems.append(f"goodput fell to {figures['goodput_ratio']:.2f} of the peak")
    fixed = {
        "workload": plan.workload,
        "deadline_ms": plan.deadline_ms,
        "sent_deadline_ms": plan.deadline_ms - plan.way_ms,
        "overload": OVERLOAD,
        "limit": plan.limit,
        "server_flags": list(plan.all_flags),
        "environment": ENVIRONMENT,
    }
    write_result(
        arguments.json, {**figures, **fixed, "problems": problems, "runs": runs}, arguments.seeds
    )
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
