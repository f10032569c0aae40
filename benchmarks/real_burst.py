"""A burst against a running server, for real: splits that stay, and controllers that move them.

A small DLRMv3's rows are in a Redis behind a link of stated round trip and bandwidth. Passers-by
with many candidates give way to regulars with long histories, and come back. The requests of a
seed are drawn once, recorded, and sent to every arm at the same times: static splits, and
controllers by name, each in a server of its own. Arms take turns, and who begins changes from
repeat to repeat. The cost profile that controllers go by is measured first, on this machine,
through the same link. The static splits are those that the simulator finds best with that profile,
or those of `--statics`.

A run in which the machine was busier than 90 % is void, and with it its repeat.

    python benchmarks/real_burst.py --json benchmarks/results/real_burst.json --seeds 1,2,3 \
        --plot docs/real_burst.png
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
from rich.progress import track

from benchmarks import burst_requests
from benchmarks.burst_requests import Recording, record
from benchmarks.parameter_server import ParameterServer, rows_behind_link
from benchmarks.process_samples import core_pids
from benchmarks.real_burst_figures import Run, boundary_of, draw, max_score_diff, summary
from benchmarks.recorded_client import Outcome, Replay, replay
from benchmarks.report import benchmark_parser, write_result
from benchmarks.server_process import ServerProcess, started
from helm_engine.config import HostTierConfig
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.simulator.hindsight import p99_ms
from helm_engine.simulator.simulation import EngineModel, Result, simulate
from model_executor.cost_profile import CostProfile, load_cost_profile

REGIME_S, WARM_UP_S = 25.0, 10.0
CONTROL_PERIOD_S = ControllerConfig().period_s
QUICK_REGIME_S, QUICK_WARM_UP_S = 5.0, 3.0
QUICK_BATCHES = 60
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Static splits that are tried in the simulator..."""
STATICS = 2
"""...and how many of them are run for real."""
BEGINS_AT = 0.5
"""Where controllers find the split."""
CONTROLLERS = ("helm", "marginal")
HOST_TIER = HostTierConfig(link_bytes_per_second=int(burst_requests.LINK_BYTES_PER_S))
ENGINE = {"OMP_NUM_THREADS": "1"}
"""On two cores: the engine computes on one, everybody else has the other."""
TOLERANCE = 1e-5
"""Of scores, which the split must not change."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to split the pool."""

    name: str
    emb_fraction: float
    """Where the split begins."""
    controller: str | None = None


def measure(model_dir: Path, rows: ParameterServer, out: Path, batches: int | None) -> CostProfile:
    """What work costs here, through the link, as an operator finds out.

    Raises:
        CalledProcessError: it could not be measured.
    """
    own = [] if batches is None else ["--batches", str(batches)]
    command = [sys.executable, "-m", "helm_engine.entrypoints.cli", "profile", str(model_dir)]
    subprocess.run(
        [*command, *engine_flags(rows), "--out", str(out), "--log-level", "warning", *own],
        env={**os.environ, **ENGINE},
        check=True,
    )
    return load_cost_profile(out)


def engine_flags(rows: ParameterServer) -> list[str]:
    """Those of every arm."""
    values = {
        "pool-bytes": burst_requests.POOL_BYTES,
        "max-num-batched-tokens": burst_requests.SCHEDULER.max_num_batched_tokens,
        "host-tier": rows.url,
        "host-tier-timeout": 10,
        "host-link-bytes-per-second": HOST_TIER.link_bytes_per_second,
    }
    return _flags(values)


def arm_flags(arm: Arm, profile: Path, decision_log: Path) -> list[str]:
    """An arm's own."""
    values: dict[str, object] = {"emb-fraction": arm.emb_fraction}
    if arm.controller is not None:
        values |= {
            "controller": arm.controller,
            "control-period": CONTROL_PERIOD_S,
            "slo-ms": burst_requests.SLO_MS,
            "cost-profile": profile,
            "decision-log": decision_log,
        }
    return _flags(values)


def _flags(values: Mapping[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def simulated(recording: Recording, profile: CostProfile, arm: Arm) -> Result:
    """The same requests in virtual time, without front and client."""
    control = ControllerConfig(
        name=arm.controller, period_s=CONTROL_PERIOD_S, slo_ms=burst_requests.SLO_MS
    )
    model = EngineModel(
        recording.trace.setting,
        profile,
        burst_requests.SCHEDULER,
        HOST_TIER.refill,
        control,
    )
    return simulate(recording.trace, model, arm.emb_fraction)


def best_statics(recordings: Sequence[Recording], profile: CostProfile) -> dict[float, float]:
    """P99 of static splits in the simulator, over all recordings, by share; the best first."""
    found = {}
    for share in SHARES:
        latencies = []
        for one in recordings:
            result = simulated(one, profile, Arm("", share))
            latencies.append(result.latencies_ms[one.trace.arrivals >= one.warm_up_s])
        found[share] = p99_ms(np.concatenate(latencies))
    return dict(sorted(found.items(), key=lambda one: one[1]))


@dataclass(frozen=True, slots=True)
class Place:
    """Where arms are run."""

    model_dir: Path
    rows: ParameterServer
    profile: Path
    """File of the measured profile."""
    client: ProcessPoolExecutor


def run_arm(place: Place, arm: Arm, recording: Recording) -> Run:
    """One recording against one server."""
    with tempfile.TemporaryDirectory(prefix="helm-burst-") as directory:
        log = Path(directory) / "decisions.jsonl"
        flags = [*engine_flags(place.rows), *arm_flags(arm, place.profile, log)]
        with started(place.model_dir, *flags, environment=ENGINE) as server:
            outcome = _asked(server, recording, place)
            status = server.stop()
        decisions = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    boundary = boundary_of([json.loads(one) for one in decisions], outcome.began, arm.emb_fraction)
    return Run(arm.name, recording, outcome, boundary, status)


def _asked(server: ServerProcess, recording: Recording, place: Place) -> Outcome:
    front = server.process.pid
    processes = {
        "front": [front],
        "core": core_pids(front),
        "redis": [place.rows.redis_pid],
        "link": [place.rows.link_pid],
    }
    arrivals = recording.trace.arrivals.tolist()
    wanted = Replay(server.address, arrivals, recording.bodies, processes)
    return place.client.submit(replay, wanted).result()


def arms_of(statics: Sequence[float], controllers: Sequence[str]) -> list[Arm]:
    """Static ones first."""
    still = [Arm(f"static:{share:g}", share) for share in statics]
    return still + [Arm(name, BEGINS_AT, name) for name in controllers]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--plot", type=Path, help="where a picture of the split over time goes")
    parser.add_argument(
        "--controllers",
        type=lambda text: [name for name in text.split(",") if name],
        help=f"comma-separated; default: {','.join(CONTROLLERS)}, with --quick the first",
    )
    parser.add_argument(
        "--statics",
        type=lambda text: [float(part) for part in text.split(",")],
        help=f"EMB shares, comma-separated; default: the {STATICS} that the simulator finds best",
    )
    parser.add_argument("--regime-seconds", type=float, help=f"default: {REGIME_S:g}")
    return parser.parse_args()


def main() -> None:
    """Runs all arms in turns and writes the result file; ends with status 1 on any problem."""
    arguments = parsed()
    quick = arguments.quick
    regime_s = arguments.regime_seconds or (QUICK_REGIME_S if quick else REGIME_S)
    law = burst_requests.workload(regime_s, QUICK_WARM_UP_S if quick else WARM_UP_S)
    recordings = [record(law, seed) for seed in arguments.seeds]
    controllers = arguments.controllers
    if controllers is None:
        controllers = CONTROLLERS[:1] if quick else CONTROLLERS
    model_dir = burst_requests.served_model()
    link = burst_requests.ROUND_TRIP_MS, burst_requests.LINK_BYTES_PER_S
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="helm-burst-") as directory,
        rows_behind_link(model_dir, *link) as rows,
        ProcessPoolExecutor(1, spawn) as client,
    ):
        place = Place(model_dir, rows, Path(directory) / "profile.json", client)
        profile = measure(model_dir, rows, place.profile, QUICK_BATCHES if quick else None)
        rough = best_statics(recordings, profile)
        statics = arguments.statics or sorted([*rough][: 1 if quick else STATICS])
        arms = arms_of(statics, controllers)
        repeats: list[dict[str, Run]] = []
        for number, recording in enumerate(track(recordings, "repeats")):
            order = [*arms[number % len(arms) :], *arms[: number % len(arms)]]
            runs = {arm.name: run_arm(place, arm, recording) for arm in order}
            repeats.append({arm.name: runs[arm.name] for arm in arms})
    if arguments.plot:
        draw(arguments.plot, repeats[0])
    told = {arm.name: [simulated(one, profile, arm) for one in recordings] for arm in arms}
    found = {
        **summary(repeats, [arm.name for arm in arms if arm.controller is None], told),
        "simulated_p99_ms_of_statics": {f"{share:g}": p99 for share, p99 in rough.items()},
        "profile": asdict(profile),
        "requests_sha256": [one.digest for one in recordings],
        "workload": burst_requests.describe(law),
        "environment": ENGINE,
        "control_period_s": CONTROL_PERIOD_S,
    }
    write_result(arguments.json, found, arguments.seeds)
    problems = _problems(repeats)
    if problems:
        raise SystemExit("\n".join(problems))


def _problems(repeats: Sequence[dict[str, Run]]) -> list[str]:
    """What must not be, however busy the machine was."""
    found = [
        f"{run.arm}: the server ended with status {run.status}"
        for repeat in repeats
        for run in repeat.values()
        if run.status
    ]
    difference = max_score_diff(repeats)
    if not difference <= TOLERANCE:
        found.append(f"scores differ by {difference:.1e} from those of another split")
    return found


if __name__ == "__main__":
    main()
