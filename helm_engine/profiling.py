"""Measures what work costs on this device: steps of a loaded engine, and a linear model of them.

Requests of many sizes run through the engine itself: short and long histories, new and returning
users, few and many candidates, rows that are resident and rows that are not, alone and several in
a step. What each step did and how long it took, the scheduler's own time included, gives the
milliseconds of a `CostProfile` by least squares of relative errors.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from helm_engine.clock import SystemClock
from helm_engine.engine_core import EngineCore
from helm_engine.engine_loader import LoadedEngine
from helm_engine.protocol import parse_request
from helm_engine.sample_request import sample_request
from helm_engine.scheduler import build_scheduler
from model_executor.capabilities import step_rules
from model_executor.cost_profile import CostProfile, StepWork, work_of
from model_executor.executor import Executor
from model_executor.model_config import StuConfig
from model_executor.step import ModelOutput, SchedulerOutput

FloatArray = npt.NDArray[np.float64]

_MOST_CANDIDATES = 2048
_MOST_TOGETHER = 4
_PAUSE_S = 0.01
"""Between two batches, as requests come to an engine that is not always busy: what they need has
left the nearest caches then."""
_HOT_ITEMS = 512
_SHARES = (0.2, 0.8)
"""Splits of the pool between which rows are moved."""
_OUTLIER = 0.15
"""Relative errors beyond it count less and less (Huber 1964)."""
_ROUNDS = 20


class MeasuredStep(NamedTuple):
    """A step that was carried out."""

    work: StepWork
    wall_ms: float
    load_ms: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A profile, and how well it tells what it was made from."""

    profile: CostProfile
    num_steps: int
    relative_errors: list[float]
    """Median, and 90th percentile, of |predicted - measured| / measured over these steps."""


class _Watched:
    """Passes steps on and keeps what the last one did."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._last: tuple[StepWork, float] | None = None

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """See `Executor.execute`."""
        output = self._executor.execute(step)
        self._last = work_of(step), output.timings_ms.load
        return output

    def timed_step(self, core: EngineCore) -> MeasuredStep | None:
        """One step of the core over this executor; None = there was nothing to carry out.

        Raises:
            HelmError: a request failed.
        """
        self._last = None
        began = time.perf_counter()
        ended = core.step()
        wall_ms = (time.perf_counter() - began) * 1e3
        for request in ended:
            if request.error is not None:
                raise request.error
        return self._taken(wall_ms)

    def _taken(self, wall_ms: float) -> MeasuredStep | None:
        return None if self._last is None else MeasuredStep(self._last[0], wall_ms, self._last[1])


def measure_profile(
    engine: LoadedEngine, *, device: str, source: str, batches: int = 150, seed: int = 0
) -> Measured:
    """Measures a device through an engine on it.

    The engine's own books are left alone, but its pool is written over: it must be idle, and hold
    nothing that is still to be reused.

    Args:
        engine: loaded, with the host tier that is to be priced.
        device: what the profile is of.
        source: where its figures come from.
        batches: how many times requests are sent.
        seed: of their sizes and items.

    Raises:
        HelmError: a request failed, as where rows cannot be had.
    """
    served = engine.served
    rules = step_rules(served.model_config, served.capabilities)
    rows = served.model_config.num_rows
    scheduler = build_scheduler(served.config.scheduler, served.layout, rows, rules)
    watched = _Watched(engine.runner)
    core = EngineCore(scheduler, watched, SystemClock())
    steps: list[MeasuredStep] = []
    draws = _Draws(engine, np.random.default_rng(seed))
    for number in range(batches):
        for place, body in enumerate(draws.batch()):
            # Only to be told apart: users and items are the draws'.
            name = f"{number}-{place}"
            now = time.monotonic()
            core.add_request(engine.processor.process(parse_request(body), name, now).request)
        steps += _run(core, watched)
        time.sleep(_PAUSE_S)
    if rules.recomputes_last_row:  # Candidates meet that row, and no other of the context.
        steps = [one._replace(work=one.work._replace(candidate_pairs=0)) for one in steps]
    moves = _move_rows(core, watched)
    warm = steps[len(steps) // 10 :]
    profile, relative = fit_profile(warm, moves, device, source)
    return Measured(profile, len(warm), np.quantile(relative, [0.5, 0.9]).tolist())


def describe_device(engine: LoadedEngine) -> str:
    """The device that an engine computes on, and where its rows come from."""
    device = torch.device(engine.served.config.executor.device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{torch.get_num_threads()} threads of {platform.machine()}"
    tier = "mmap" if engine.served.config.host_tier.redis_address is None else "a Redis"
    return f"{name}, rows from {tier}"


def _run(core: EngineCore, watched: _Watched) -> list[MeasuredStep]:
    """Steps until all requests are answered."""
    steps: list[MeasuredStep] = []
    while core.has_work:
        step = watched.timed_step(core)
        if step is not None:
            steps.append(step)
    return steps


def _move_rows(core: EngineCore, watched: _Watched) -> list[MeasuredStep]:
    """Steps that move rows off pages, with no request among them."""
    core.scheduler.refills.is_suspended = True
    boundary, found = core.scheduler.boundary, []
    for share in (*_SHARES, *_SHARES):
        core.set_target(share)
        while boundary.lag_pages:
            pages = boundary.num_moved_pages
            step = watched.timed_step(core)
            if step is not None and step.work.moves:
                found.append(step)
            if boundary.num_moved_pages == pages:
                break  # A floor: the rest of the way is not to be had.
    return found


class _Draws:
    """Bodies of requests of all sizes."""

    def __init__(self, engine: LoadedEngine, numbers: np.random.Generator) -> None:
        self._model = engine.served.model_config
        self._numbers = numbers
        limits, steps = engine.served.config.limits, engine.served.config.scheduler
        longest = min(self._model.max_sequence_len, limits.max_history_events)
        if not engine.served.capabilities.chunkable.value:
            # Context and candidates share the one step.
            longest = min(longest, steps.max_num_batched_tokens // self._model.tokens_per_event)
            longest = max(1, longest - self._model.num_contextual_tokens - _MOST_TOGETHER)
        self._longest = longest
        most = min(limits.max_candidates, _MOST_CANDIDATES, self._model.num_items // 2)
        if isinstance(self._model, StuConfig):
            most = min(most, self._model.max_candidates)
        self._most_candidates = most
        self._retrieves = engine.served.can_retrieve
        self._users = 0
        self._last: dict[str, Any] = {}

    def batch(self) -> list[dict[str, Any]]:
        """What is sent at once: one request, or several."""
        together = self._numbers.integers(2, _MOST_TOGETHER + 1) if self._coin(0.3) else 1
        return [self._body() for _ in range(together)]

    def _coin(self, share: float) -> bool:
        return bool(self._numbers.random() < share)

    def _size(self, most: int) -> int:
        """1 to `most`, small sizes as often as large ones."""
        return max(1, min(most, int(np.exp(self._numbers.uniform(0.0, np.log(most + 1.0))))))

    def _items(self, number: int, hot: bool) -> list[int]:
        first = self._model.first_item_id
        among = min(_HOT_ITEMS, self._model.num_items) if hot else self._model.num_items
        drawn: list[int] = (first + self._numbers.integers(among, size=number)).tolist()
        return drawn

    def _body(self) -> dict[str, Any]:
        """A new user, or the last one, with a history that may have grown."""
        returns = bool(self._last) and self._coin(0.5)
        if returns:
            user, items = self._last["user"], self._last["items"]
            room = self._longest - len(items)
            items = items + self._items(min(room, self._size(self._longest)), hot=self._coin(0.5))
        else:
            self._users += 1
            user = f"profile-{self._users}"
            length = max(1, self._longest - self._size(self._longest) + 1)
            items = self._items(length if self._coin(0.5) else self._size(self._longest), True)
        self._last = {"user": user, "items": items}
        candidates: list[int] | None = None
        if not (self._retrieves and self._coin(0.2)):
            # Candidates are told apart by the front, so that equal ones are merged.
            candidates = self._items(self._size(self._most_candidates), hot=self._coin(0.4))
        times = list(range(len(items)))
        return {"user": user, **sample_request(self._model, items, times, candidates)}


def fit_profile(
    steps: Sequence[MeasuredStep], moves: Sequence[MeasuredStep], device: str, source: str
) -> tuple[CostProfile, FloatArray]:
    """The profile that explains steps best, and its relative error of each, float64 [steps].

    Loads are told apart from the rest: they have a timing of their own.

    Args:
        steps: with requests.
        moves: without, which do nothing but move rows.
        device: what the profile is of.
        source: where its figures come from.
    """
    work = np.array([step.work for step in steps], dtype=np.float64)
    column = dict(zip(StepWork._fields, work.T, strict=True))
    wall = np.array([step.wall_ms for step in steps])
    load = np.array([step.load_ms for step in steps])
    loads = column["missing"] > 0
    # What a step without missing rows takes to prepare is a part of every step.
    idle = float(np.median(load[~loads])) if (~loads).any() else 0.0
    waited = np.maximum(load - idle, 0.0) * loads
    # The idle part stays in: errors are relative, and what is left of a short wait without it may
    # be as good as nothing, which would then count for more than all others.
    begun_ms, row_miss_ms = (
        _least_squares(
            np.stack([np.ones(int(loads.sum())), column["missing"][loads]], axis=1),
            np.maximum(load[loads], 1e-6),
        )
        if loads.any()
        else (idle, 0.0)
    )
    round_trip_ms = max(0.0, begun_ms - idle)
    names = ("requests", "rows", "pairs", "candidates", "candidate_pairs", "retrievals")
    terms = np.stack([np.ones(len(wall)), *(column[name] for name in names)], axis=1)
    computed = np.maximum(wall - waited, 1e-6)
    found = _least_squares(terms, computed)
    step_ms, request_ms, row_ms, pair_ms, candidate_ms, candidate_pair_ms, retrieval_ms = found
    copied = sum(step.work.moves for step in moves)
    profile = CostProfile(
        device=device,
        source=source,
        step_ms=step_ms,
        prefill_row_ms=row_ms,
        attention_pair_ms=pair_ms,
        candidate_ms=candidate_ms,
        retrieval_ms=retrieval_ms,
        row_miss_ms=row_miss_ms,
        round_trip_ms=round_trip_ms,
        row_copy_ms=sum(step.load_ms for step in moves) / copied if copied else 0.0,
        candidate_pair_ms=candidate_pair_ms,
        request_ms=request_ms,
    )
    predicted = terms @ found + loads * round_trip_ms + column["missing"] * row_miss_ms
    return profile, np.abs(predicted - wall) / wall


def _least_squares(terms: FloatArray, spent: FloatArray) -> list[float]:
    """Coefficients of at least 0 that explain what was spent, by relative errors.

    Args:
        terms: float64 [n, k].
        spent: above 0, float64 [n].
    """
    used = [place for place in range(terms.shape[1]) if terms[:, place].any()]
    found = np.zeros(terms.shape[1])
    weights = np.ones(len(spent))
    for _ in range(_ROUNDS):
        while used:
            scaled = terms[:, used] / spent[:, None]
            size = np.abs(scaled).max(axis=0)  # Pairs are counted in millions.
            root = np.sqrt(weights)
            solution = np.linalg.lstsq(scaled / size * root[:, None], root, rcond=None)[0] / size
            if solution.min() >= 0.0:
                break
            del used[int(solution.argmin())]
        found[:] = 0.0
        if not used:
            break
        found[used] = solution
        errors = np.abs(terms @ found / spent - 1.0)
        weights = _OUTLIER / np.maximum(errors, _OUTLIER)
    return [float(one) for one in found]
