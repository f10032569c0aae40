"""MLCommons LoadGen, Server and Offline, against the running HTTP server.

The model is `dlrmv3-mini-abs` with 640 events and 256 candidates; the samples are visits of
returning users, each with ten new events. Requests must follow time, so, as in MLPerf's DLRMv3
harness, LoadGen's sample indices are ignored and the visits are sent in their own order. First
visits are sent before a run and are not measured. Server: Poisson arrivals, p99 within 80 ms; the
largest target rate of a falling series whose run LoadGen calls valid counts, and its summary is
kept beside the result. This is no MLPerf submission: minimum run times and sample counts are
smaller, and the model is a small one with random weights.

    python benchmarks/loadgen.py --json benchmarks/results/loadgen.json
"""

from __future__ import annotations

import http.client
import queue
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import mlperf_loadgen as lg

from benchmarks.report import benchmark_parser, write_result
from benchmarks.returning_visits import Asked, model_dir, returning_visits
from benchmarks.server_process import served

HISTORY = 640
USERS = 64
RETURNS = 8
LATENCY_MS = 80
CONNECTIONS = 32
RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Of the offline rate, tried in this order."""
FLAGS = ("--pool-bytes", "512MiB", "--max-num-batched-tokens", "8192")


@dataclass
class Sender:
    """Sends visits over kept connections, in the order of the stream, as LoadGen asks for them."""

    address: str
    visits: Iterator[Asked]
    waiting: queue.SimpleQueue[tuple[int, bytes] | None] = field(default_factory=queue.SimpleQueue)
    failures: list[str] = field(default_factory=list)

    def issue(self, samples: list[Any]) -> None:
        """LoadGen's call: queues one returning visit for each sample."""
        for sample in samples:
            self.waiting.put((sample.id, self._next_returning()))

    def _next_returning(self) -> bytes:
        return next(asked for asked in self.visits if asked.returning).with_user

    def send_until_closed(self) -> None:
        """What each sending thread does."""
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=60)
        while (entry := self.waiting.get()) is not None:
            sample_id, body = entry
            problem = _post(connection, body)
            if problem is not None:
                self.failures.append(problem)
            lg.QuerySamplesComplete([lg.QuerySampleResponse(sample_id, 0, 0)])
        connection.close()


def _post(connection: http.client.HTTPConnection, body: bytes) -> str | None:
    connection.request("POST", "/v1/recommend", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    return None if response.status == 200 else f"{response.status}: {answer[:200]!r}"


@contextmanager
def sending(address: str, visits: Iterator[Asked]) -> Iterator[Sender]:
    """A sender with its threads.

    Raises:
        SystemExit: a request failed.
    """
    sender = Sender(address, visits)
    threads = [threading.Thread(target=sender.send_until_closed) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    try:
        yield sender
    finally:
        for _ in threads:
            sender.waiting.put(None)
        for thread in threads:
            thread.join()
    if sender.failures:
        raise SystemExit(f"{len(sender.failures)} requests failed: {sender.failures[0]}")


def warm(address: str, visits: Iterator[Asked], number: int) -> None:
    """Sends visits one after another, so that most seats have come once."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    for asked in islice(visits, number):
        problem = _post(connection, asked.with_user)
        if problem is not None:
            raise SystemExit(problem)
    connection.close()


def run(settings: Any, sender: Sender, logs: Path) -> str:
    """One LoadGen run; returns its summary."""
    output = lg.LogOutputSettings()
    output.outdir = str(logs)
    log_settings = lg.LogSettings()
    log_settings.log_output = output
    under_test = lg.ConstructSUT(sender.issue, lambda: None)
    library = lg.ConstructQSL(1024, 1024, lambda indices: None, lambda indices: None)
    lg.StartTestWithLogSettings(under_test, library, settings, log_settings)
    lg.DestroyQSL(library)
    lg.DestroySUT(under_test)
    return (logs / "mlperf_log_summary.txt").read_text(encoding="utf-8")


def common_settings(scenario: Any, seconds: float, queries: int) -> Any:
    """Settings of a performance run."""
    settings = lg.TestSettings()
    settings.scenario = scenario
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = int(seconds * 1e3)
    settings.min_query_count = queries
    return settings


def offline(address: str, seconds: float, seed: int, logs: Path) -> float:
    """Samples per second with all samples there at once."""
    visits = returning_visits("abs", HISTORY, RETURNS, USERS, seed)
    warm(address, visits, 3 * USERS)
    settings = common_settings(lg.TestScenario.Offline, seconds, 1)
    settings.offline_expected_qps = 100.0
    with sending(address, visits) as sender:
        summary = run(settings, sender, logs)
    return _figure(summary, "Samples per second")


def server(
    address: str, rate: float, seconds: float, seed: int, logs: Path
) -> tuple[dict[str, Any], bool]:
    """A Server run at a target rate, and whether LoadGen calls it valid."""
    visits = returning_visits("abs", HISTORY, RETURNS, USERS, seed)
    warm(address, visits, 3 * USERS)
    settings = common_settings(lg.TestScenario.Server, seconds, 100)
    settings.server_target_qps = rate
    settings.server_target_latency_ns = int(LATENCY_MS * 1e6)
    settings.server_target_latency_percentile = 0.99
    with sending(address, visits) as sender:
        summary = run(settings, sender, logs)
    valid = "Result is : VALID" in summary
    tried = {
        "target_qps": rate,
        "completed_per_s": _figure(summary, "Completed samples per second"),
        "p99_ms": _figure(summary, "99.00 percentile latency (ns)") / 1e6,
        "valid": valid,
    }
    return tried, valid


def _figure(summary: str, name: str) -> float:
    found = re.search(rf"^\s*{re.escape(name)}\s*:\s*(\S+)", summary, re.MULTILINE)
    if found is None:
        raise SystemExit(f"LoadGen's summary has no line {name!r}:\n{summary}")
    return float(found[1])


def main() -> None:
    """Offline first, then Server at falling rates until a run is valid, for each seed."""
    arguments = benchmark_parser(__doc__).parse_args()
    seconds = 12.0 if arguments.quick else 60.0
    shares = RATES[-2:] if arguments.quick else RATES
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    runs: list[dict[str, Any]] = []
    kept = arguments.json.with_name(f"{arguments.json.stem}_server_summary.txt")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as directory,
        served(model_dir("abs", HISTORY), *FLAGS) as address,
    ):
        logs = Path(directory)
        for seed in seeds:
            best = 0.0
            samples = offline(address, seconds, seed, logs)
            attempts: list[dict[str, Any]] = []
            for share in shares:
                tried, valid = server(address, share * samples, seconds, seed, logs)
                attempts.append(tried)
                if valid:
                    best = tried["target_qps"]
                    shutil.copy(logs / "mlperf_log_summary.txt", kept)
                    break
            runs.append({"seed": seed, "offline": samples, "server": best, "tried": attempts})
    served_rates = sorted(run["server"] for run in runs)
    offline_rates = sorted(run["offline"] for run in runs)
    figures = {
        "server_qps_p99_80ms": served_rates[len(runs) // 2],
        "server_qps_p99_80ms_range": [served_rates[0], served_rates[-1]],
        "offline_samples_per_s": offline_rates[len(runs) // 2],
        "offline_samples_per_s_range": [offline_rates[0], offline_rates[-1]],
        "min_duration_s": seconds,
        "server_flags": list(FLAGS),
        "runs": runs,
    }
    write_result(arguments.json, figures, seeds)


if __name__ == "__main__":
    main()
