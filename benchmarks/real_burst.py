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
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # For `python benchmarks/NAME.py`.

import numpy as np
import torch
from rich.progress import track

from benchmarks import burst_requests
from benchmarks.burst_requests import Recording, record
from benchmarks.parameter_server import ParameterServer, rows_behind_link
from benchmarks.process_samples import core_pids
from benchmarks.real_burst_figures import Run, boundary_of, draw, max_score_diff, summary
from benchmarks.recorded_client import Outcome, Replay, replay
from benchmarks.report import benchmark_parser, write_result
from benchmarks.server_process import ServerProcess, started
from block_manager.pool_layout import PoolConfig
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, HostTierConfig
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.engine_loader import load_engine
from helm_engine.profiling import Measured, measure_profile
from helm_engine.simulator.simulation import EngineModel, simulate

REGIME_S, WARM_UP_S = 25.0, 10.0
QUICK_REGIME_S, QUICK_WARM_UP_S = 5.0, 3.0
QUICK_BATCHES = 60
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Static splits that are tried in the simulator..."""
STATICS = 2
"""...and how many of them are run for real."""
BEGINS_AT = 0.5
"""Where controllers find the split."""
CONTROLLERS = ("helm", "marginal")
CONTROL_PERIOD_S = 1.0
HOST_TIER = HostTierConfig(link_bytes_per_second=int(burst_requests.LINK_BYTES_PER_S))
SERVER = {"OMP_NUM_THREADS": "1"}
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


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    model_dir: Path
    arms: Sequence[Arm]
    profile: Path
    """File of the measured profile."""

    def flags(self, arm: Arm, rows: ParameterServer, decision_log: Path) -> list[str]:
        """Of `helm-engine serve`."""
        values = {
            "pool-bytes": burst_requests.POOL_BYTES,
            "emb-fraction": arm.emb_fraction,
            "max-num-batched-tokens": burst_requests.SCHEDULER.max_num_batched_tokens,
            "host-tier": rows.url,
            "host-tier-timeout": 10,
            "host-link-bytes-per-second": HOST_TIER.link_bytes_per_second,
        }
        if arm.controller is not None:
            values |= {
                "controller": arm.controller,
                "control-period": CONTROL_PERIOD_S,
                "slo-ms": burst_requests.SLO_MS,
                "cost-profile": self.profile,
                "decision-log": decision_log,
            }
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def measured_profile(rows: ParameterServer, batches: int | None) -> Measured:
    """What work costs here, through the link; in this process, on one thread."""
    config = EngineConfig(
        burst_requests.served_model(),
        pool=PoolConfig(burst_requests.POOL_BYTES),
        scheduler=burst_requests.SCHEDULER,
        host_tier=HOST_TIER,
    )
    torch.set_num_threads(1)
    engine = load_engine(config, SystemClock(), rows.store(timeout_s=10.0))
    own = {} if batches is None else {"batches": batches}
    found = measure_profile(engine, device="this machine", source="benchmarks/real_burst.py", **own)
    engine.runner.close()
    return found


def simulated(recording: Recording, measured: Measured, arm: Arm) -> Any:
    """The same requests in virtual time, without front and client."""
    control = ControllerConfig(
        name=arm.controller, period_s=CONTROL_PERIOD_S, slo_ms=burst_requests.SLO_MS
    )
    model = EngineModel(
        recording.trace.setting,
        measured.profile,
        burst_requests.SCHEDULER,
        HOST_TIER.refill,
        control,
    )
    return simulate(recording.trace, model, arm.emb_fraction)


def best_statics(recordings: Sequence[Recording], measured: Measured) -> dict[float, float]:
    """P99 of static splits in the simulator, over all recordings, by share; the best first."""
    found = {}
    for share in SHARES:
        latencies = []
        for one in recordings:
            result = simulated(one, measured, Arm("", share))
            latencies.append(result.latencies_ms[one.trace.arrivals >= one.warm_up_s])
        found[share] = float(np.nanquantile(np.concatenate(latencies), 0.99))
    return dict(sorted(found.items(), key=lambda one: one[1]))


def run_arm(
    plan: Plan, arm: Arm, recording: Recording, rows: ParameterServer, pool: ProcessPoolExecutor
) -> Run:
    """One recording against one server."""
    with tempfile.TemporaryDirectory(prefix="helm-burst-") as directory:
        log = Path(directory) / "decisions.jsonl"
        flags = plan.flags(arm, rows, log)
        with started(plan.model_dir, *flags, environment=SERVER) as server:
            outcome = _asked(server, recording, rows, pool)
            status = server.stop()
        decisions = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    boundary = boundary_of([json.loads(one) for one in decisions], outcome.began, arm.emb_fraction)
    return Run(arm.name, recording, outcome, boundary, status)


def _asked(
    server: ServerProcess, recording: Recording, rows: ParameterServer, pool: ProcessPoolExecutor
) -> Outcome:
    front = server.process.pid
    processes = {
        "front": [front],
        "core": core_pids(front),
        "redis": [rows.redis_pid],
        "link": [rows.link_pid],
    }
    arrivals = recording.trace.arrivals.tolist()
    return pool.submit(
        replay, Replay(server.address, arrivals, recording.bodies, processes)
    ).result()


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
        ProcessPoolExecutor(1, spawn) as pool,
    ):
        measured = measured_profile(rows, QUICK_BATCHES if quick else None)
        profile = Path(directory) / "profile.json"
        profile.write_text(json.dumps(asdict(measured.profile)), encoding="utf-8")
        rough = best_statics(recordings, measured)
        number = 1 if quick else STATICS
        arms = arms_of(arguments.statics or sorted([*rough][:number]), controllers)
        plan = Plan(model_dir, arms, profile)
        repeats: list[dict[str, Run]] = []
        for place, recording in enumerate(track(recordings, "repeats")):
            order = [*arms[place % len(arms) :], *arms[: place % len(arms)]]
            runs = {arm.name: run_arm(plan, arm, recording, rows, pool) for arm in order}
            repeats.append({arm.name: runs[arm.name] for arm in arms})
    told = {arm.name: [simulated(one, measured, arm) for one in recordings] for arm in arms}
    if arguments.plot:
        draw(arguments.plot, repeats[0])
    found = {
        **summary(repeats, [arm.name for arm in arms if arm.controller is None], told),
        "simulated_p99_ms_of_statics": {f"{share:g}": p99 for share, p99 in rough.items()},
        "profile": asdict(measured),
        "requests_sha256": [one.digest for one in recordings],
        "workload": burst_requests.describe(law),
        "server": {"environment": SERVER, "control_period_s": CONTROL_PERIOD_S},
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
