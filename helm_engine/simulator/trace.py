"""The requests of a workload, drawn once for a seed: arrays, of which requests are views.

Block hashes are computed once for each person's longest history; every visit uses a beginning of
them, because a history only grows. Requests change while they run, so each run cuts new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from block_manager.block_hash import BlockHash, hash_blocks, root_hash, user_digest, user_tag
from helm_engine.request import Request
from helm_engine.simulator import laws
from helm_engine.simulator.laws import FloatArray, Int64Array
from helm_engine.simulator.scaling import check_scale, coarse_hashes, coarse_history, sampled_rows
from helm_engine.simulator.workloads import Regime, Setting, Workload
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
    candidates do among all. Reading Python's numbers out of a list takes less than out of arrays.
    """

    def __len__(self) -> int:
        """Requests."""
        return len(self.arrivals)

    @property
    def seconds(self) -> float:
        """From the start to the end of the last regime."""
        return self.workload.ends[-1]

    def tokens(self, number: int) -> TokenSequence:
        """What the model reads of a request, as views."""
        _, begin, end, first, last = self._cuts[number]
        return TokenSequence(
            rows=self.events[begin:end],
            features=self._no_features[: end - begin],
            candidate_rows=self.candidates[first:last],
            candidate_features=self._no_features[: last - first],
            num_final=end - begin,
        )

    def request(self, number: int) -> Request:
        """A new request, which came at its time after the start."""
        tokens, person = self.tokens(number), self._cuts[number][0]
        hashes, block_tokens = self.block_hashes[person], self.setting.block_tokens
        return Request(
            request_id=str(number),
            tokens=tokens,
            top_k=0,
            excluded_ids=_NOTHING,
            block_hashes=(
                hashes[: tokens.num_final // block_tokens]
                if self.scale == 1
                else coarse_history(hashes, person, tokens.num_final, block_tokens, self.scale)
            ),
            arrival=float(self.arrivals[number]),
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
    setting = setting or workload.resolved_setting
    sequence = np.random.SeedSequence(seed)
    keys = sequence.generate_state(2, np.uint64)
    times, who, lengths, tastes = map(np.random.default_rng, sequence.spawn(4))
    arrivals = laws.arrival_times(workload, setting.requests_per_s, times)
    regime = laws.regime_of(workload, arrivals, times)
    regimes = workload.regimes
    visits = laws.follow_users(
        laws.draw_users(regimes, regime, setting.num_users, who),
        laws.draw_first_histories(regimes, regime, setting.max_history, lengths),
        np.array([one.new_events for one in regimes])[regime],
        setting.num_users,
        setting.max_history,
    )
    liked = laws.draw_tastes(setting, visits.num_people, tastes)
    drift = laws.drift_until(workload, arrivals)
    sizes = np.array([one.candidates for one in regimes])[regime]
    shown = laws.Bags(sizes, visits.people, regime, drift)
    drawn = laws.draw_items(setting, regimes, liked, shown, int(keys[0]))
    longest, starts, events = _histories(
        setting, regimes, liked, visits, regime, drift, drawn, shown, int(keys[1])
    )
    candidates, candidate_bounds = laws.distinct_items(drawn, shown.bounds)
    most = int(max(longest.max(initial=0), sizes.max(initial=0)))
    no_features = np.full((most, 1), NO_ROW, dtype=np.int64)
    begins = starts[visits.people]
    digests = [user_digest(f"user-{person}", user_key) for person in range(visits.num_people)]
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
        people=visits.people,
        lengths=visits.lengths,
        events=events,
        event_bounds=starts,
        candidates=candidates,
        candidate_bounds=candidate_bounds,
        block_hashes=hashes,
        user_tags=[user_tag(digest) for digest in digests],
        _no_features=no_features,
        _cuts=np.stack(
            [visits.people, begins, begins + visits.lengths, *_pairs(candidate_bounds)], axis=1
        ).tolist(),
    )


def _histories(
    setting: Setting,
    regimes: list[Regime],
    liked: laws.Tastes,
    visits: laws.Visits,
    regime: Int64Array,
    drift: Int64Array,
    drawn: Int64Array,
    shown: laws.Bags,
    key: int,
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Events of each person's longest history, where each person's begin, and all events."""
    # People are numbered by their first visits.
    first_visits = np.unique(visits.people, return_index=True)[1]
    firsts = laws.Bags(
        visits.lengths[first_visits],
        np.arange(visits.num_people),
        regime[first_visits],
        drift[first_visits],
    )
    first_items = laws.draw_items(setting, regimes, liked, firsts, key)
    longest = np.zeros(visits.num_people, dtype=np.int64)
    np.maximum.at(longest, visits.people, visits.lengths)
    starts = np.concatenate([[0], np.cumsum(longest)]).astype(np.int64)
    events: Int64Array = laws.fill_histories(
        visits.people, visits.lengths, firsts.bounds, first_items, drawn, shown.bounds, starts
    )
    return longest, starts, events


def _pairs(bounds: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Where each one begins and ends."""
    return bounds[:-1], bounds[1:]


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
