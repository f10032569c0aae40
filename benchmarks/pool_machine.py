"""A million random steps of both tenants of one pool, each checked against a naive model.

The machine is that of `tests/block_manager/test_pool_machine.py`, which runs some ten thousand
steps with the other tests. What is reported is not a speed but how long it ran, and what it met;
a step that broke a rule would end it with the shortest sequence of steps that does.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from benchmarks.report import benchmark_parser, write_result
from tests.block_manager.test_pool_machine import STEPS, PoolMachine

WANTED_STEPS = 1_000_000
QUICK_STEPS = 20_000
MACHINES_AT_ONCE = 500
"""So many machines for each seed; then the next seed's."""


def main() -> None:
    """Runs machines until the steps are done, each batch with the next seed."""
    arguments = benchmark_parser(__doc__).parse_args()
    wanted = QUICK_STEPS if arguments.quick else WANTED_STEPS
    run = settings(
        max_examples=MACHINES_AT_ONCE,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    began, seeds = time.monotonic(), []
    next_seed = arguments.seeds[0]
    while PoolMachine.totals["steps"] < wanted:
        seeds.append(next_seed)
        run_state_machine_as_test(seed(next_seed)(PoolMachine), settings=run)
        next_seed += 1
    figures = {"seconds": round(time.monotonic() - began), **PoolMachine.totals}
    write_result(arguments.json, figures, seeds)


if __name__ == "__main__":
    main()
