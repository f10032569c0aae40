"""What clients notice when engines of a fleet are killed, stopped and replaced.

Two engine cores behind one front, under a steady open-loop load that one of them can carry alone:
the first core is killed (SIGKILL), later the second is stopped (SIGSTOP) until the front kills it
for its silence, later a reload replaces both, one after the other. Every request must be answered
once, with 200. On a machine with few cores the processes that start take time from those that
answer: that is part of `p99_during_ms`.

    python benchmarks/faults.py --json benchmarks/results/faults.json --seeds 1,2,3
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np

from benchmarks.open_loop import answer_each
from benchmarks.overload_users import bundled_stream, mini_stream
from benchmarks.process_samples import core_pids
from benchmarks.report import benchmark_parser, write_result
from benchmarks.returning_visits import model_dir
from benchmarks.server_process import ServerProcess, started
from benchmarks.steady_load import Answers, Load, offer_steadily

UTILISATION = 0.25
"""Of what the two engines answer in a closed loop: half of what one of them can."""
ADMIN_KEY = "benchmark"
FLAGS = (
    "--num-engines", "2", "--suspect-timeout", "0.5", "--hang-timeout", "2",
    "--admin-key", ADMIN_KEY,
)  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
AT_ONCE = 8
SEATS = 64
_BACK_SECONDS = 60.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """What is served and when the faults come."""

    model_dir: Path
    flags: tuple[str, ...]
    bodies: Callable[[int], list[bytes]]
    """By seed."""
    before_s: float
    """Of load without a fault, the first third of which is left out."""
    fault_s: float
    """From one fault to the next."""


def full_plan() -> Plan:
    """The small DLRMv3."""
    return Plan(
        model_dir("abs", 640),
        ("--pool-bytes", "256MiB", "--max-num-batched-tokens", "4096"),
        lambda seed: [body for _, body in islice(mini_stream(SEATS, seed), 4000)],
        before_s=20.0,
        fault_s=20.0,
    )


def quick_plan() -> Plan:
    """The bundled model."""
    return Plan(
        REPOSITORY / "examples" / "models" / "hstu-ml-100k",
        ("--pool-bytes", "32MiB"),
        lambda seed: [body for _, body in islice(bundled_stream(16, seed), 1000)],
        before_s=6.0,
        fault_s=8.0,
    )


def states(server: ServerProcess) -> list[str]:
    """The engines' states as the front sees them."""
    with urllib.request.urlopen(f"{server.address}/info") as answer:
        return [engine["state"] for engine in json.load(answer)["engines"]]


class Faults:
    """Brings them about and notes when everything was well again."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self.back_after_s: dict[str, float] = {}

    def kill(self) -> None:
        """The first core is gone."""
        self._signal("kill", 0, signal.SIGKILL)

    def stop(self) -> None:
        """The second core says nothing more."""
        self._signal("stop", 1, signal.SIGSTOP)

    def _signal(self, name: str, place: int, number: signal.Signals) -> None:
        began, pid = time.monotonic(), core_pids(self._server.process.pid)[place]
        os.kill(pid, number)
        while pid in core_pids(self._server.process.pid) or states(self._server) != ["ready"] * 2:
            if time.monotonic() > began + _BACK_SECONDS:
                raise SystemExit(f"{name}: the engine does not come back")
            time.sleep(_POLL_SECONDS)
        self.back_after_s[name] = round(time.monotonic() - began, 2)

    def restart(self) -> None:
        """Both cores are replaced, one after the other."""
        began = time.monotonic()
        request = urllib.request.Request(
            f"{self._server.address}/v1/admin/reload",
            method="POST",
            headers={"Authorization": f"Bearer {ADMIN_KEY}"},
        )
        with urllib.request.urlopen(request, timeout=_BACK_SECONDS):
            self.back_after_s["restart"] = round(time.monotonic() - began, 2)


def run(plan: Plan, seed: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """One server from start to end."""
    rng, bodies = np.random.default_rng(seed), plan.bodies(seed)
    with started(plan.model_dir, *plan.flags, *FLAGS, environment=ENVIRONMENT) as server:
        warm = bodies[: len(bodies) // 8]
        pool.submit(answer_each, server.address, warm, AT_ONCE).result()
        rate = UTILISATION * pool.submit(answer_each, server.address, warm, AT_ONCE).result()
        seconds = plan.before_s + 3 * plan.fault_s
        times = np.sort(rng.uniform(0.0, seconds, rng.poisson(rate * seconds)))
        load = Load(server.address, bodies, times.tolist(), time.monotonic() + 1.0)
        offering = pool.submit(offer_steadily, load)
        faults = Faults(server)
        begins = {}
        for place, fault in enumerate((faults.kill, faults.stop, faults.restart)):
            due = load.begins + plan.before_s + place * plan.fault_s
            time.sleep(max(0.0, due - time.monotonic()))
            begins[fault.__name__] = time.monotonic() - load.begins
            fault()
        answers = offering.result()
        status = server.stop()
    if status:
        raise SystemExit(f"the server ended with status {status}")
    return figures(plan, times, answers, begins) | {
        "requests_per_s": round(rate, 1),
        "back_after_s": faults.back_after_s,
    }


def figures(
    plan: Plan, times: np.ndarray[Any, Any], answers: Answers, begins: dict[str, float]
) -> dict[str, Any]:
    """What clients saw."""
    statuses, latencies = np.array(answers.statuses), np.array(answers.latencies_ms)
    good = statuses == 200
    before = good & (times >= plan.before_s / 3) & (times < begins["kill"])
    bounds = [*begins.values(), np.inf]
    return {
        "sent": len(times),
        "answered": int(good.sum()),
        "answered_twice": sum(number > 1 for number in answers.ids.values()),
        "errors": int((~good).sum()),
        "statuses": {str(status): n for status, n in Counter(answers.statuses).items()},
        "p99_before_ms": _p99(latencies[before]),
        "p99_during_ms": _p99(latencies[good & (times >= begins["kill"])]),
        "p99_of_each_fault_ms": {
            name: _p99(latencies[good & (times >= bounds[place]) & (times < bounds[place + 1])])
            for place, name in enumerate(begins)
        },
        "slowest_ms": round(float(latencies.max()), 1),
    }


def _p99(values: np.ndarray[Any, Any]) -> float:
    return round(float(np.percentile(values, 99)), 1)


def main() -> None:
    """Runs each seed on a server of its own."""
    arguments = benchmark_parser(__doc__).parse_args()
    plan = quick_plan() if arguments.quick else full_plan()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        runs = [run(plan, seed, pool) for seed in arguments.seeds]
    totals = ("sent", "answered", "answered_twice", "errors")
    summary = {name: sum(one[name] for one in runs) for name in totals}
    for name in ("p99_before_ms", "p99_during_ms"):
        summary[name] = round(float(np.median([one[name] for one in runs])), 1)
    write_result(arguments.json, {**summary, "runs": runs}, arguments.seeds)
    print(json.dumps(summary))
    if summary["answered"] < summary["sent"] or summary["answered_twice"]:
        raise SystemExit("not every request was answered once")


if __name__ == "__main__":
    main()
