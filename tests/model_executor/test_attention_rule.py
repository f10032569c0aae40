"""Who reads whom: open rows, windows and groups of candidates against plain loops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from block_manager.pool_layout import PoolConfig, plan_layout
from model_executor.attention import torch_reference
from model_executor.attention.registry import attention_backend
from model_executor.attention.rule import AttentionRule
from model_executor.page_arena import PageArena
from model_executor.paged_batch import PagedBatch, build_paged_batch
from model_executor.step import CandidateScoring, ScheduledRequest
from tests.toy_models import toy_config

CPU = torch.device("cpu")
LAYER = 1
HEADS, DQK, DV = 2, 3, 5
MAX_LEN = 16

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class User:
    """Rows after projection: the context's, of which start .. are new, then the candidates'."""

    start: int
    num_rows: int
    num_candidates: int
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        return self.start + self.num_rows


def make_user(rng: np.random.Generator, start: int, num_rows: int, num_candidates: int) -> User:
    number = start + num_rows + num_candidates
    q, k, v = (
        torch.from_numpy(rng.standard_normal((number, HEADS, width)).astype(np.float32))
        for width in (DQK, DQK, DV)
    )
    return User(start, num_rows, num_candidates, q, k, v)


# ---------------------------------------------------------------- the plain loops


def reads(rule: AttentionRule, row: int, other: int, length: int) -> bool:
    """Whether a row reads another; candidates are the rows length, length + 1, ..."""
    if row >= length and other >= length:
        first_of_group = length + (row - length) // rule.group_size * rule.group_size
        return first_of_group <= other <= row
    if row < rule.num_open_rows:
        return other < length
    reader = min(row, length)  # All candidates stand right behind the context.
    if other > reader or other >= length:
        return False
    # Steps back from the reader; open rows are one step together.
    steps = sum(between >= rule.num_open_rows for between in range(other, reader))
    steps += other < min(rule.num_open_rows, reader)
    return not rule.window or steps <= rule.window


def attend_in_loops(rule: AttentionRule, user: User) -> Array:
    """Every new context row and every candidate, pair by pair in float64."""
    q, k, v = (part.numpy().astype(np.float64) for part in (user.q, user.k, user.v))
    rows = range(user.start, user.length + user.num_candidates)
    attended = np.zeros((len(rows), HEADS, DV))
    for place, row in enumerate(rows):
        others = [other for other in range(len(q)) if reads(rule, row, other, user.length)]
        for head in range(HEADS):
            scores = [rule.scale * float(q[row, head] @ k[other, head]) for other in others]
            if rule.weights == "softmax":
                total = math.fsum(math.exp(score) for score in scores)
                weights = [math.exp(score) / total for score in scores]
            else:
                weights = [score / (1.0 + math.exp(-score)) / rule.normaliser for score in scores]
            for weight, other in zip(weights, others, strict=True):
                attended[place, head] += weight * v[other, head]
    return attended


# ---------------------------------------------------------------- the backend


def lay_out(
    rng: np.random.Generator, users: list[User], block_tokens: int
) -> tuple[PageArena, PagedBatch, tuple[Tensor, Tensor, Tensor]]:
    """Contexts in pages in random order, with NaN in all other memory; and q, k, v of the step."""
    config = toy_config("stu", num_layers=2, num_heads=HEADS, dqk=DQK, dv=DV)
    layout = plan_layout(
        PoolConfig(1 << 19, 0.0, block_tokens),
        kv_bytes_per_token=config.kv_elements_per_token * 4,
        row_bytes=config.row_dim * 4,
        max_context_tokens=MAX_LEN,
        staging_rows=0,
    )
    arena = PageArena(layout, config, CPU, torch.float32)
    arena.poison()
    unused = rng.permutation(np.arange(1, layout.num_pages))
    requests = []
    for number, user in enumerate(users):
        blocks = -(-user.length // block_tokens)
        table, unused = unused[:blocks], unused[blocks:]
        places = np.arange(user.length)
        pages = torch.from_numpy(table[places // block_tokens])
        offsets = torch.from_numpy(places % block_tokens)
        arena.kv.append(LAYER, user.k[: user.length], user.v[: user.length], pages, offsets)
        nothing = np.zeros((user.length + user.num_candidates, 1), dtype=np.int64)
        task = CandidateScoring(np.arange(user.num_candidates), nothing[user.length :])
        requests.append(
            ScheduledRequest(
                request_id=str(number),
                start=user.start,
                row_index=np.arange(user.num_rows),
                block_table=table,
                features=nothing[: user.length],
                task=task if user.num_candidates else None,
            )
        )
    batch = build_paged_batch(requests, block_tokens, CPU, candidates_in_sequence=True)
    return arena, batch, (of_step(users, "q"), of_step(users, "k"), of_step(users, "v"))


def of_step(users: list[User], name: str) -> Tensor:
    """New context rows of all users, then the candidates of all."""
    parts = [getattr(user, name) for user in users]
    contexts = [part[one.start : one.length] for part, one in zip(parts, users, strict=True)]
    candidates = [part[one.length :] for part, one in zip(parts, users, strict=True)]
    return torch.cat(contexts + candidates)


def wanted(rule: AttentionRule, users: list[User]) -> Array:
    attended = [attend_in_loops(rule, user) for user in users]
    contexts = [part[: one.num_rows] for part, one in zip(attended, users, strict=True)]
    candidates = [part[one.num_rows :] for part, one in zip(attended, users, strict=True)]
    return np.concatenate(contexts + candidates)


@st.composite
def _rules(draw: st.DrawFn) -> AttentionRule:
    return AttentionRule(
        weights=draw(st.sampled_from(["silu", "silu", "softmax"])),
        scale=draw(st.sampled_from([1.0, 0.3])),
        normaliser=draw(st.integers(1, 40)),
        num_open_rows=draw(st.integers(0, 3)),
        window=draw(st.sampled_from([0, 0, 1, 2, 5])),
        group_size=draw(st.integers(1, 4)),
    )


@st.composite
def _shares(draw: st.DrawFn) -> tuple[AttentionRule, list[tuple[int, int, int]]]:
    """A rule and what each user brings to a step: start, context rows, candidates."""
    rule = draw(_rules())
    shares = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(max(1, rule.num_open_rows), MAX_LEN))
        # Contexts with open rows come as one chunk; later steps bring candidates alone.
        starts = st.sampled_from([0, length]) if rule.num_open_rows else st.integers(0, length)
        start = draw(starts)
        least = int(start == length)
        shares.append((start, length - start, draw(st.integers(least, 7))))
    return rule, shares


@settings(max_examples=80)
@given(
    scenario=_shares(),
    block_tokens=st.integers(1, 6),
    pairs_per_tile=st.sampled_from([1, 50, 1 << 23]),
    seed=st.integers(0, 2**32 - 1),
)
def test_paged_attention_equals_plain_loops_under_every_rule(
    scenario: tuple[AttentionRule, list[tuple[int, int, int]]],
    block_tokens: int,
    pairs_per_tile: int,
    seed: int,
) -> None:
    rule, shares = scenario
    rng = np.random.default_rng(seed)
    users = [make_user(rng, *share) for share in shares]
    arena, batch, (q, k, v) = lay_out(rng, users, block_tokens)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(torch_reference, "PAIRS_PER_TILE", pairs_per_tile)
        got = attention_backend("torch", torch.device("cpu")).attend(
            q, k, v, arena.kv, LAYER, batch, rule
        )
    np.testing.assert_allclose(got.numpy(), wanted(rule, users), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("last_rows", [False, True])
def test_last_layer_computes_the_rows_that_are_scored_with_and_no_others(last_rows: bool) -> None:
    rng = np.random.default_rng(3)
    shares = [(0, 6, 4), (4, 5, 0), (7, 1, 3)]
    users = [make_user(rng, *share) for share in shares]
    rule = AttentionRule("silu", 0.5, normaliser=9, group_size=2)
    arena, batch, (q, k, v) = lay_out(rng, users, 4)
    narrowed, picked = batch.narrow(last_rows)
    ends = [5, 10, 11] if last_rows else []
    assert picked.tolist() == [*ends, *range(12, 19)]
    backend = attention_backend("torch", torch.device("cpu"))
    with torch.inference_mode():
        whole = backend.attend(q, k, v, arena.kv, LAYER, batch, rule)
        few = backend.attend(q[picked], k, v, arena.kv, LAYER, narrowed, rule)
    torch.testing.assert_close(few, whole[picked])
    np.testing.assert_allclose(whole.numpy(), wanted(rule, users), rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------- worked by hand


def readers_of(rule: AttentionRule, length: int, num_candidates: int) -> dict[int, str]:
    """Which rows each row reads, as a line of marks; found out by changing one value at a time."""
    rng = np.random.default_rng(0)
    user = make_user(rng, 0, length, num_candidates)
    user.q.fill_(1.0)
    user.k.fill_(1.0)
    found: dict[int, Any] = {row: "" for row in range(length + num_candidates)}
    for other in range(length + num_candidates):
        user.v.fill_(0.0)
        user.v[other] = 1.0
        arena, batch, (q, k, v) = lay_out(np.random.default_rng(1), [user], 4)
        with torch.inference_mode():
            attended = attention_backend("torch", torch.device("cpu")).attend(
                q, k, v, arena.kv, LAYER, batch, rule
            )
        for row, value in enumerate(attended[:, 0, 0].tolist()):
            found[row] += "x" if value else "."
    return found


def test_rows_of_a_context_are_causal_and_candidates_read_all_of_it_and_themselves() -> None:
    assert readers_of(AttentionRule("silu", 1.0), 3, 2) == {
        0: "x....",
        1: "xx...",
        2: "xxx..",
        3: "xxxx.",
        4: "xxx.x",
    }


def test_open_rows_read_the_whole_context_and_no_candidate() -> None:
    assert readers_of(AttentionRule("silu", 1.0, num_open_rows=2), 4, 1) == {
        0: "xxxx.",
        1: "xxxx.",
        2: "xxx..",
        3: "xxxx.",
        4: "xxxxx",
    }


def test_window_counts_open_rows_as_one() -> None:
    assert readers_of(AttentionRule("silu", 1.0, num_open_rows=2, window=2), 5, 1) == {
        0: "xxxxx.",
        1: "xxxxx.",
        2: "xxx...",
        3: "xxxx..",
        4: "..xxx.",
        5: "...xxx",
    }


def test_candidates_read_those_before_them_in_their_group() -> None:
    assert readers_of(AttentionRule("softmax", 1.0, group_size=2), 1, 5) == {
        0: "x.....",
        1: "xx....",
        2: "xxx...",
        3: "x..x..",
        4: "x..xx.",
        5: "x....x",
    }
