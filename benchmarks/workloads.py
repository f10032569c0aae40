"""The workloads of `serving.py`: which model, who visits it, how much of it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.movielens_visits import movielens_visits
from benchmarks.replay_ml100k import MODEL_DIR
from benchmarks.returning_visits import Asked, model_dir, returning_visits
from examples.dlrmv3_mini import Variant
from helm_engine.datasets.ml100k import MovieLens100K

HEADLINE = "abs_4096"
MOVIELENS = "ml100k"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Returning users on one model."""

    name: str
    model_dir: Callable[[], Path]
    """Makes the model's directory where it is not there."""
    visits: Callable[[int], Iterator[Asked]]
    """An endless stream, of a seed."""
    users: int
    """Seats: who may come at any time."""
    pool_bytes: int
    batch: int
    """Visits in flight at saturation."""
    batches: int
    """Measured, for each seed."""
    segment: int
    """Visits of an open-loop segment."""


def _generated(name: str, variant: Variant, history: int, users: int, **sizes: int) -> Workload:
    """Generated users who come back eight times on a small DLRMv3."""
    return Workload(
        name=name,
        model_dir=partial(model_dir, variant, history),
        visits=partial(returning_visits, variant, history, 8, users),
        users=users,
        **sizes,
    )


_SHORT = {"users": 64, "pool_bytes": 512 << 20, "batch": 16}

GENERATED = (
    _generated("abs_640", "abs", 640, **_SHORT, batches=40, segment=100),
    _generated(
        HEADLINE, "abs", 4096, users=24, pool_bytes=1 << 30, batch=8, batches=12, segment=40
    ),
    # As published nothing may be reused across requests: ours must not be slower for trying.
    _generated("stu_640", "stu", 640, **_SHORT, batches=10, segment=50),
)


def movielens(dataset: MovieLens100K) -> Workload:
    """Real users on the bundled model: to be shown, since a model so small proves little.

    Its rows are 0.3 MB, so that the tenants do not compete for anything.
    """
    users = 64
    return Workload(
        name=MOVIELENS,
        model_dir=lambda: MODEL_DIR,
        visits=partial(movielens_visits, dataset, users),
        users=users,
        pool_bytes=32 << 20,
        batch=16,
        batches=40,
        segment=1000,  # A second or so.
    )
