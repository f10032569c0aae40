"""Which engine is best for a request: policies by name, each a pure function over all engines.

A policy scores every engine, the lowest score wins and ties are broken at random. `least_load`,
`kv`, `emb` and `joint` are one function, the predicted milliseconds until the answer; they differ
in what they are told. To add a policy, write the function and name it in `POLICIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from router.cost import NO_USER_TAG, FloatArray, Int64Array

TIE_SHARE = 0.01
"""Of a request's own work: a lead below it is noise of the prediction and decides nothing, or the
engine that happens to look best would get every cold user of a quiet hour. Of the work, not of the
cost: behind long queues the gain from what is resident is a small share of the cost."""
LOAD_BOUND = 1.25
"""How far above the average queue a hashed engine's may be, as Mirrokni, Thorup and Zadimoghaddam
("Consistent Hashing with Bounded Loads", SODA 2018) evaluate it."""
_BEHIND_ALL = 2.0**54
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class Offers(NamedTuple):
    """What the engines offer for a request; all arrays are over engine slots."""

    is_open: npt.NDArray[np.bool_]
    """Engines to choose from, one at least; the scores of the others are not looked at."""
    queue_ms: FloatArray
    """Work before it: routed to the engine and not finished."""
    service_ms: FloatArray
    """The request's own work on the engine, with what the policy may know resident there."""
    name_hashes: npt.NDArray[np.uint64]
    """Hashes of the engines' names."""
    turns: Int64Array
    """Engines between the one picked last and each, going round in the order of the names."""
    user_tag: int
    """A hash of the user, or NO_USER_TAG."""


class Policy(NamedTuple):
    """How an engine is chosen."""

    score: Callable[[Offers], FloatArray]
    """Float64 [E]; lower is better."""
    knows_kv: bool
    """Whether `service_ms` leaves out tokens whose KV the engine holds."""
    knows_rows: bool
    """Whether `service_ms` leaves out rows that the engine holds."""


def predicted_ms(offers: Offers) -> FloatArray:
    """Milliseconds until the answer, with what is as good as the best made equal to it."""
    cost = offers.queue_ms + offers.service_ms
    best = cost[offers.is_open].min()
    as_good = best + TIE_SHARE * offers.service_ms[offers.is_open].min()
    return np.where(cost <= as_good, best, cost)


def round_robin(offers: Offers) -> FloatArray:
    """The next engine by name."""
    return offers.turns.astype(np.float64)


def consistent_hash(offers: Offers) -> FloatArray:
    """A user's own engine, and where its queue is too long the user's next one.

    Each user ranks the engines by a hash of both (rendezvous hashing: Thaler and Ravishankar,
    "Using name-based mappings to increase hit rates", 1998), so when an engine leaves only its
    users move. Requests without a user go by predicted time.
    """
    if offers.user_tag == NO_USER_TAG:
        return predicted_ms(offers)
    bits = offers.name_hashes ^ np.uint64(offers.user_tag)
    # The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    for shift, multiplier in _MULTIPLIERS:
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(multiplier)
    bits ^= bits >> np.uint64(31)
    rank = (bits >> np.uint64(11)).astype(np.float64)
    # One request of its own is always allowed, or an idle fleet would send a user to and fro.
    average_ms = offers.queue_ms[offers.is_open].mean() + offers.service_ms
    rank[offers.queue_ms > LOAD_BOUND * average_ms] += _BEHIND_ALL
    return rank


POLICIES = {
    "joint": Policy(predicted_ms, knows_kv=True, knows_rows=True),
    "kv": Policy(predicted_ms, knows_kv=True, knows_rows=False),
    "emb": Policy(predicted_ms, knows_kv=False, knows_rows=True),
    "least_load": Policy(predicted_ms, knows_kv=False, knows_rows=False),
    "round_robin": Policy(round_robin, knows_kv=False, knows_rows=False),
    "consistent_hash": Policy(consistent_hash, knows_kv=False, knows_rows=False),
}
"""By name; the first is the default."""


def policy_named(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"policy: must be one of {', '.join(POLICIES)}, not {name!r}")
    return POLICIES[name]
