"""Layer inputs of ranking models: what tokens without a pool row and late positions turn into."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model_executor.inputs.features import Events, RequestFeatures
from model_executor.inputs.registry import build_inputs
from model_executor.models.nvidia import NvidiaHSTU
from model_executor.models.registry import build_model
from model_executor.models.sequence_model import SequenceModel
from model_executor.models.stu import StuHSTU
from model_executor.paged_batch import PagedBatch, build_paged_batch
from model_executor.step import NO_ROW, CandidateScoring, ScheduledRequest
from tests.toy_models import randomise, toy_config

NUM_EVENTS, NUM_CANDIDATES = 5, 2


def make_batch(model: SequenceModel, context: list[int]) -> tuple[PagedBatch, Tensor]:
    """One request's tokens and their pool rows; NaN where a token has none."""
    rng = np.random.default_rng(0)
    num_features = len(model.config.item_features)

    def events(number: int) -> Events:
        return Events(
            item_ids=rng.integers(1, 60, number),
            timestamps=np.sort(rng.integers(0, 9000, number)),
            actions=rng.integers(0, 9, number),
            features=rng.integers(0, 7, (number, num_features)),
        )

    features = RequestFeatures(
        events(NUM_EVENTS), events(NUM_CANDIDATES), np.array(context, dtype=np.int64), 10_000
    )
    tokens = build_inputs(model.config).assemble(features)
    length = len(tokens.rows)
    task = CandidateScoring(np.arange(NUM_CANDIDATES), tokens.candidate_features)
    scheduled = ScheduledRequest(
        "only", 0, np.arange(length), np.arange(length), tokens.features, task
    )
    batch = build_paged_batch([scheduled], 1, torch.device("cpu"), candidates_in_sequence=True)
    generator = torch.Generator().manual_seed(1)
    ids = np.concatenate([tokens.rows, tokens.candidate_rows])
    rows = torch.randn(len(ids), model.config.row_dim, generator=generator)
    rows[torch.from_numpy(ids == NO_ROW)] = torch.nan
    return batch, rows


@torch.no_grad()
def embed(model: SequenceModel, context: list[int]) -> Tensor:
    batch, rows = make_batch(model, context)
    return model.embed(rows, batch)


def make_model(dialect: str, **changes: Any) -> SequenceModel:
    model = build_model(toy_config(dialect, **changes)).requires_grad_(False)
    randomise(model)
    return model


def contextual(min_sequence_len: int = 0, **sizes: int) -> list[dict[str, Any]]:
    return [
        {"name": name, "num_rows": rows, "min_sequence_len": min_sequence_len}
        for name, rows in sizes.items()
    ]


@pytest.mark.parametrize("dialect", ["stu", "nvidia"])
@pytest.mark.parametrize("sizes", [{"a": 4}, {"a": 9000}, {"a": 9000, "b": 4}, {"b": 4, "a": 9000}])
def test_tokens_without_a_pool_row_read_none(dialect: str, sizes: dict[str, int]) -> None:
    inputs = embed(make_model(dialect, contextual=contextual(**sizes)), [3] * len(sizes))
    assert bool(inputs.isfinite().all())


@pytest.mark.parametrize("sizes", [{"a": 4}, {"a": 9000}, {"a": 9000, "b": 4}])
def test_void_contextual_feature_counts_as_a_vector_of_zeros(sizes: dict[str, int]) -> None:
    # It asks for one event or candidate more than there are.
    features = contextual(NUM_EVENTS + NUM_CANDIDATES + 1, **sizes)
    model = make_model("stu", contextual=features)
    assert isinstance(model, StuHSTU)
    inputs = embed(model, [3] * len(sizes))
    # Of request time 10 000: floor(sqrt(10 000 / 60)) is 12.
    placed = model.position_embedding[: len(sizes)] + model.time_embedding[12]
    want = model.contextual_bias * 12**0.5 + placed
    torch.testing.assert_close(inputs[: len(sizes)], want)


def test_small_contextual_tables_of_nvidia_lie_behind_that_of_the_actions() -> None:
    model = make_model("nvidia", contextual=contextual(a=4, b=3))
    assert isinstance(model, NvidiaHSTU)
    inputs = embed(model, [3, 1])
    vectors = [
        model.small_tables["table_contextual_a"][3],
        model.small_tables["table_contextual_b"][1],
    ]
    want = torch.stack(vectors) * 12**0.5 + model.position_embedding[:2]
    torch.testing.assert_close(inputs[:2], want)


@pytest.mark.parametrize("buckets", [1, 4, 9, 10, 11, 12])
def test_positions_of_nvidia_beyond_the_table_share_its_last_row(buckets: int) -> None:
    model = make_model("nvidia", num_position_buckets=buckets)
    assert isinstance(model, NvidiaHSTU)
    placed = embed(model, [])
    model.position_embedding.zero_()
    added = placed - embed(model, [])
    randomise(model)
    # Ten tokens of five events; both candidates stand behind the last of them.
    for position, row in zip([*range(10), 10, 10], added, strict=True):
        want = model.position_embedding[min(position, buckets - 1)]
        torch.testing.assert_close(row, want, atol=1e-5, rtol=1e-4)
