"""The requests of a workload, drawn once for a seed: arrays, of which requests are views.

Block hashes are computed once for each person's longest history; every visit uses a beginning of
them, because a history only grows. Requests change while they run, so each run cuts new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from block_manager.block_hash import BlockHash, hash_blocks, root_hash, user_digest, user_tag
from helm_engine.request import Request
from helm_engine.simulator import traffic
from helm_engine.simulator.events.choice import event_law
from helm_engine.simulator.events.law import Asked, bounds_of
from helm_engine.simulator.histories import distinct_items, fill_histories
from helm_engine.simulator.scaling import check_scale, coarse_hashes, coarse_history, sampled_rows
from helm_engine.simulator.traffic import FloatArray, Int64Array
from helm_engine.simulator.workloads import Setting, Workload
from model_executor.capabilities import StepRules
from model_executor.inputs.features import TokenSequence
from model_executor.step import NO_ROW

RULES = StepRules(recomputes_last_row=False)
"""Of the model that requests are made for: HSTU that ranks, one token for an event, positions from
the oldest (`dlrmv3-mini-abs` of the examples)."""

_NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order in which they come."""

    workload: Workload
    setting: Setting
    seed: int
    scale: int
    """Above 1, rows are the sample's, NO_ROW where one is not in it, and blocks stand for so many;
    see `scaling`."""
    arrivals: FloatArray
    """Seconds after the start, ascending, float64 [n]."""
    regimes: Int64Array
    """Number of the regime whose laws each follows, int64 [n]."""
    people: Int64Array
    """Who makes each, int64 [n]."""
    lengths: Int64Array
    """Events of each history, int64 [n]."""
    events: Int64Array
    """Items of all people's histories, one person after the other, int64 [events]."""
    event_bounds: Int64Array
    """Where each person's begin, and the last's end, int64 [people + 1]."""
    candidates: Int64Array
    """Distinct items of all requests, int64 [candidates]."""
    candidate_bounds: Int64Array
    """Where each request's begin, and the last's end, int64 [n + 1]."""
    block_hashes: list[list[BlockHash]]
    """Of the full blocks of each person's longest history, or of those that stand for them."""
    user_tags: list[int]
    """Of each person."""
    _no_features: Int64Array
    """[longest history or number of candidates, 1]."""
    _cuts: list[list[int]]
    """Of each request: who makes it, where its history begins and ends among all events, where its
    candidates do among all, how many of its blocks may be reused. Reading Python's numbers out of a
    list takes less than out of arrays."""
    deadlines_ms: FloatArray | None = None
    """After each came; infinite = it has none. float64 [n]; None = no request has one."""
    priorities: Int64Array | None = None
    """Of each, int64 [n]; None = all alike."""

    def __len__(self) -> int:
        """Requests."""
        return len(self.arrivals)

    @property
    def seconds(self) -> float:
        """From the start to the end of the last regime."""
        return self.workload.ends[-1]

    def tokens(self, number: int) -> TokenSequence:
        """What the model reads of a request, as views."""
        _, begin, end, first, last, _ = self._cuts[number]
        return TokenSequence(
            rows=self.events[begin:end],
            features=self._no_features[: end - begin],
            candidate_rows=self.candidates[first:last],
            candidate_features=self._no_features[: last - first],
            num_final=end - begin,
        )

    def request(self, number: int) -> Request:
        """A new request, which came at its time after the start."""
        tokens, (person, *_, num_blocks) = self.tokens(number), self._cuts[number]
        hashes, block_tokens = self.block_hashes[person], self.setting.block_tokens
        arrival = float(self.arrivals[number])
        deadlines, priorities = self.deadlines_ms, self.priorities
        return Request(
            request_id=str(number),
            tokens=tokens,
            top_k=0,
            excluded_ids=_NOTHING,
            block_hashes=(
                hashes[:num_blocks]
                if self.scale == 1
                else coarse_history(hashes, person, tokens.num_final, block_tokens, self.scale)
            ),
            arrival=arrival,
            deadline=inf if deadlines is None else arrival + float(deadlines[number]) / 1e3,
            priority=0 if priorities is None else int(priorities[number]),
            user_tag=self.user_tags[person],
        )


def make_trace(
    workload: Workload,
    seed: int,
    *,
    setting: Setting | None = None,
    model_version: str = "simulated",
    user_key: bytes = b"simulated",
    scale: int = 1,
) -> Trace:
    """Draws a workload's requests.

    Args:
        workload: what to draw.
        seed: the same seed makes the same trace.
        setting: instead of the workload's own.
        model_version: what block hashes begin with.
        user_key: keys the hashes of users; people are called `user-0` and so on.
        scale: of the engine that it is for; see `scaling`.

    Raises:
        ValueError: the setting does not fit the workload's regimes, or it is no scale; names the
            field.
    """
    check_scale(scale)
    if setting is None:
        setting = workload.resolved_setting
    workload.check_fits(setting)
    law = event_law(setting, workload.regimes)
    sequence = np.random.SeedSequence(seed)
    shown_key, first_key = sequence.generate_state(2, np.uint64).tolist()
    times, who, lengths, items, sizes = map(np.random.default_rng, sequence.spawn(5))
    arrivals = traffic.arrival_times(workload, setting.requests_per_s, times)
    regime = traffic.regime_of(workload, arrivals, times)
    asked = _visits(
        workload, setting, arrivals, regime, law.new_events(regime, sizes), who, lengths
    )
    drawn = law.draw(asked, items, (first_key, shown_key))
    longest = np.zeros(asked.num_people, dtype=np.int64)
    np.maximum.at(longest, asked.people, asked.lengths)
    starts, shown_bounds = bounds_of(longest), asked.shown_bounds
    events = fill_histories(
        asked.people, asked.lengths, asked.first_bounds, *drawn, shown_bounds, starts
    )
    candidates, candidate_bounds = distinct_items(drawn.shown, shown_bounds)
    most = int(max(longest.max(initial=0), asked.candidates.max(initial=0)))
    no_features = np.full((most, 1), NO_ROW, dtype=np.int64)
    begins = starts[asked.people]
    digests = [user_digest(f"user-{person}", user_key) for person in range(asked.num_people)]
    if scale == 1:
        hashes = _hashes(events, starts, digests, model_version, setting.block_tokens)
    else:
        numbers, _ = sampled_rows(setting, scale)
        events, candidates = (numbers[one].astype(np.int64) for one in (events, candidates))
        hashes = coarse_hashes(longest, digests, setting.block_tokens, scale)
    return Trace(
        workload=workload,
        setting=setting,
        seed=seed,
        scale=scale,
        arrivals=arrivals,
        regimes=regime,
        people=asked.people,
        lengths=asked.lengths,
        events=events,
        event_bounds=starts,
        candidates=candidates,
        candidate_bounds=candidate_bounds,
        block_hashes=hashes,
        user_tags=[user_tag(digest) for digest in digests],
        _no_features=no_features,
        _cuts=cuts(
            asked.people,
            begins,
            asked.lengths,
            candidate_bounds,
            asked.lengths // setting.block_tokens,
        ),
    )


def _visits(
    workload: Workload,
    setting: Setting,
    arrivals: FloatArray,
    regime: Int64Array,
    new_events: Int64Array,
    who: np.random.Generator,
    lengths: np.random.Generator,
) -> Asked:
    """Who makes each request, with how long a history, and what a law of events is asked of it."""
    regimes = workload.regimes
    visits = traffic.follow_users(
        traffic.draw_users(regimes, regime, setting.num_users, who),
        traffic.draw_first_histories(regimes, regime, setting.max_history, lengths),
        new_events,
        setting.num_users,
        setting.max_history,
    )
    return Asked(
        people=visits.people,
        lengths=visits.lengths,
        regimes=regime,
        candidates=np.array([one.candidates for one in regimes])[regime],
        new_events=new_events,
        drift=traffic.drift_until(workload, arrivals),
    )


def cuts(
    people: Int64Array,
    begins: Int64Array,
    lengths: Int64Array,
    candidate_bounds: Int64Array,
    num_blocks: Int64Array,
) -> list[list[int]]:
    """See `Trace._cuts`: all int64 [n], but for the bounds, [n + 1]."""
    firsts, lasts = candidate_bounds[:-1], candidate_bounds[1:]
    columns = [people, begins, begins + lengths, firsts, lasts, num_blocks]
    found: list[list[int]] = np.stack(columns, axis=1).tolist()
    return found


def _hashes(
    events: Int64Array,
    starts: Int64Array,
    digests: list[bytes],
    model_version: str,
    block_tokens: int,
) -> list[list[BlockHash]]:
    """Hashes of all people's full blocks."""
    inputs = np.stack([events, np.full_like(events, NO_ROW)], axis=1)
    bounds = starts.tolist()
    return [
        hash_blocks(root_hash(model_version, digest), inputs[begin:end], block_tokens)
        for digest, begin, end in zip(digests, bounds[:-1], bounds[1:], strict=True)
    ]
