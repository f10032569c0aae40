"""The paged reference backend against a dense loop, and time buckets against the logarithm."""

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
from model_executor.layers.hstu_layer import ResearchHSTULayer
from model_executor.layers.relative_bias import RelativeBias, time_bucket_edges, time_buckets
from model_executor.model_config import ResearchConfig
from model_executor.models import research
from model_executor.models.research import ResearchHSTU
from model_executor.page_arena import PageArena
from model_executor.paged_batch import build_paged_batch
from model_executor.step import ScheduledRequest
from tests.toy_models import randomise, toy_config

CPU = torch.device("cpu")
MAX_LEN = 20
NORMALISER = 23
NUM_BUCKETS = 64
LAYER = 1

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class History:
    """One user's rows after projection; of these, start .. start + num_rows - 1 are a chunk.

    There is one time more than rows: the request's.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    times: npt.NDArray[np.int64]
    start: int
    num_rows: int


def make_history(
    rng: np.random.Generator, heads: int, dqk: int, dv: int, start: int, num_rows: int
) -> History:
    def rows(width: int) -> Tensor:
        shape = (start + num_rows, heads, width)
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    gaps = rng.integers(1, 10, start + num_rows + 1) ** rng.integers(0, 8)
    return History(rows(dqk), rows(dqk), rows(dv), np.cumsum(gaps), start, num_rows)


def attend_in_a_dense_loop(history: History, bias: RelativeBias) -> Array:
    """The formula, pair by pair in float64, over the history as it is: [num_rows, H, dv]."""
    q, k, v = (tensor.numpy().astype(np.float64) for tensor in (history.q, history.k, history.v))
    position_weight = bias.position_weight.detach().numpy().astype(np.float64)
    time_weight = bias.time_weight.detach().numpy().astype(np.float64)
    attended = np.zeros((history.num_rows, q.shape[1], v.shape[2]))
    for i in range(history.start, history.start + history.num_rows):
        for j in range(i + 1):
            seconds = abs(int(history.times[i + 1]) - int(history.times[j]))
            bucket = min(NUM_BUCKETS, math.floor(math.log(max(1, seconds)) / 0.301))
            added = position_weight[(j - i) + NORMALISER - 1] + time_weight[bucket]
            for head in range(q.shape[1]):
                score = float(q[i, head] @ k[j, head]) + added
                weight = score / (1.0 + math.exp(-score)) / NORMALISER
                attended[i - history.start, head] += weight * v[j, head]
    return attended


def attend_in_pages(
    rng: np.random.Generator,
    histories: list[History],
    model: ResearchHSTU,
    block_tokens: int,
    backend: str = "torch",
) -> Tensor:
    """All chunks as one batch, over pages in random order, with NaN in all other memory."""
    config = model.config
    layout = plan_layout(
        PoolConfig(1 << 18, 0.0, block_tokens),
        kv_bytes_per_token=config.kv_elements_per_token * 4,
        row_bytes=config.row_dim * 4,
        max_context_tokens=MAX_LEN,
        staging_rows=0,
    )
    arena = PageArena(layout, config, CPU, torch.float32)
    arena.poison_pages(torch.arange(layout.num_pages))
    unused = rng.permutation(np.arange(1, layout.num_pages))
    requests: list[ScheduledRequest] = []
    for history in histories:
        length = history.start + history.num_rows
        blocks = -(-length // block_tokens)
        table, unused = unused[:blocks], unused[blocks:]
        places = np.arange(length)
        pages = torch.from_numpy(table[places // block_tokens])
        offsets = torch.from_numpy(places % block_tokens)
        arena.kv.append(LAYER, history.k, history.v, pages, offsets)
        requests.append(
            ScheduledRequest(
                request_id=str(len(requests)),
                start=history.start,
                row_index=np.arange(history.num_rows),
                block_table=table,
                features=np.column_stack([history.times[:-1], history.times[1:]]),
                task=None,
            )
        )
    batch = build_paged_batch(requests, block_tokens, CPU)
    q, k, v = (
        torch.cat([getattr(history, name)[history.start :] for history in histories])
        for name in "qkv"
    )
    with torch.inference_mode():
        bias = model.pair_bias(batch)(LAYER)
        return attention_backend(backend, torch.device("cpu")).attend(
            q, k, v, arena.kv, LAYER, batch, model.rule, bias
        )


def make_model(seed: int, heads: int, dqk: int, dv: int) -> ResearchHSTU:
    """Two layers with tables of their own."""
    config = toy_config(
        num_layers=2,
        num_heads=heads,
        dqk=dqk,
        dv=dv,
        max_sequence_len=MAX_LEN,
        max_output_len=NORMALISER - MAX_LEN,
        num_time_buckets=NUM_BUCKETS,
    )
    assert isinstance(config, ResearchConfig)
    model = ResearchHSTU(config)
    randomise(model, seed)
    for name, parameter in model.named_parameters():
        if ".bias." in name:  # As large as the products they are added to.
            parameter.data.mul_(2.0)
    return model


def bias_of(model: ResearchHSTU) -> RelativeBias:
    layer = model.layers[LAYER]
    assert isinstance(layer, ResearchHSTULayer)
    return layer.bias


chunks = st.integers(1, MAX_LEN).flatmap(
    lambda length: st.integers(0, length - 1).map(lambda start: (start, length - start))
)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.fixed_dictionaries(
        {
            "heads": st.integers(1, 3),
            "dqk": st.integers(1, 6),
            "dv": st.integers(1, 6),
        }
    ),
    block_tokens=st.integers(1, 6),
    spans=st.lists(chunks, min_size=1, max_size=4),
    pairs_per_tile=st.sampled_from([1, 50, 1 << 23]),
    seed=st.integers(0, 2**32 - 1),
)
def test_paged_attention_equals_a_dense_loop(
    shape: dict[str, int],
    block_tokens: int,
    spans: list[tuple[int, int]],
    pairs_per_tile: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    histories = [make_history(rng, **shape, start=start, num_rows=rows) for start, rows in spans]
    model = make_model(seed % 1000, **shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_reference, "PAIRS_PER_TILE", pairs_per_tile)
        patch.setattr(research, "_BUCKETS_PER_TILE", pairs_per_tile)
        got = attend_in_pages(rng, histories, model, block_tokens)
    bias = bias_of(model)
    want = np.concatenate([attend_in_a_dense_loop(history, bias) for history in histories])
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=2e-5)


def test_row_does_not_read_a_later_row_of_its_chunk() -> None:
    shape: dict[str, Any] = {"heads": 2, "dqk": 3, "dv": 5}
    history = make_history(np.random.default_rng(0), **shape, start=2, num_rows=6)
    model = make_model(0, **shape)
    before = attend_in_pages(np.random.default_rng(1), [history], model, 4)
    history.k[7], history.v[7] = 100.0, 100.0
    after = attend_in_pages(np.random.default_rng(1), [history], model, 4)
    assert torch.equal(before[:-1], after[:-1])


def test_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"attention_backend: 'flash' .*torch"):
        attention_backend("flash", torch.device("cpu"))


# ---------------------------------------------------------------- time buckets


def buckets_of(seconds: list[int], num_buckets: int = NUM_BUCKETS) -> list[int]:
    """Of events that many seconds before a query at the year 2001."""
    now = 10**9
    keys = torch.tensor([now - second for second in seconds], dtype=torch.int64)
    found = time_buckets(torch.tensor([now]), keys, time_bucket_edges(num_buckets))
    flat: list[int] = found[0].tolist()
    return flat


def bucket_by_logarithm(seconds: int, num_buckets: int = NUM_BUCKETS) -> int:
    return min(num_buckets, math.floor(math.log(max(1, abs(seconds))) / 0.301))


def is_away_from_edges(seconds: int) -> bool:
    place = math.log(max(1, abs(seconds))) / 0.301
    return abs(place - round(place)) > 1e-9


@settings(deadline=None)
@given(seconds=st.lists(st.integers(-(2**54), 2**54).filter(is_away_from_edges), min_size=1))
def test_bucket_is_the_logarithm_of_the_distance_in_time(seconds: list[int]) -> None:
    assert buckets_of(seconds) == [bucket_by_logarithm(second) for second in seconds]


@pytest.mark.parametrize("num_buckets", [1, 64, 128, 1024])
def test_bucket_is_right_at_exact_powers_and_beside_them(num_buckets: int) -> None:
    powers = [2**n for n in range(54)] + [10**n for n in range(16)] + [3**n for n in range(33)]
    seconds = sorted({power + beside for power in powers for beside in (-1, 0, 1)} - {0})
    want = [bucket_by_logarithm(second, num_buckets) for second in seconds]
    assert buckets_of(seconds, num_buckets) == want


@pytest.mark.parametrize("seconds", [0, 1, -1])
def test_events_within_a_second_are_in_the_first_bucket(seconds: int) -> None:
    assert buckets_of([seconds]) == [0]


def test_bucket_of_each_whole_second_of_the_first_day_is_right() -> None:
    seconds = list(range(86_400))
    assert buckets_of(seconds) == [bucket_by_logarithm(second) for second in seconds]


def test_longest_distances_are_in_the_last_bucket() -> None:
    assert buckets_of([2**40], num_buckets=5) == [5]


def test_each_query_has_a_bucket_for_each_key() -> None:
    queries, keys = torch.tensor([10, 100, 1000]), torch.tensor([0, 10])
    found = time_buckets(queries, keys, time_bucket_edges(NUM_BUCKETS))
    want = [[bucket_by_logarithm(query - key) for key in (0, 10)] for query in (10, 100, 1000)]
    assert found.tolist() == want
