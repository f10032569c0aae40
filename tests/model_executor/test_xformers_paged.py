"""xformers' paged kernel, in Triton's interpreter, against the torch reference."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from helm_engine.config import ExecutorConfig
from helm_engine.recommender import Recommender
from model_executor.attention.backend import AttentionShape
from model_executor.attention.registry import attention_backend
from model_executor.attention.rule import AttentionRule
from model_executor.attention.torch_reference import TorchReferenceAttention
from model_executor.page_arena import PagedKV
from tests.model_executor.test_cpu_fused import Case, Lengths, make_case
from tests.toy_models import toy_config, toy_engine_config, write_toy_model

xformers_paged = pytest.importorskip("model_executor.attention.xformers_paged")

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
RULE = AttentionRule(weights="softmax", scale=1.0 / math.sqrt(16))
SHAPE = AttentionShape(
    rule=RULE,
    num_heads=2,
    dqk=16,
    dv=16,
    dtype=torch.bfloat16,
    candidates_in_sequence=False,
    block_tokens=16,
    page_bytes=2 * 2 * 16 * 2 * 16 * 2,
)


def in_one_pool(case: Case) -> Case:
    """The same pages, K and V of a page side by side as in a pool."""
    both = torch.stack([case.kv.k, case.kv.v], dim=1).contiguous()
    return dataclasses.replace(case, kv=PagedKV(k=both[:, 0], v=both[:, 1]))


# Not shrunk: the interpreter is slow.
@settings(max_examples=10, phases=[Phase.explicit, Phase.generate])
@given(
    lengths=st.lists(
        st.builds(Lengths, st.integers(0, 40), st.integers(1, 40), st.just(0)),
        min_size=1,
        max_size=3,
    ),
    dim=st.sampled_from([16, 32]),
    block_tokens=st.sampled_from([16, 32, 48]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 100),
)
def test_equals_the_reference_over_pages_in_any_order(
    lengths: list[Lengths], dim: int, block_tokens: int, dtype: torch.dtype, seed: int
) -> None:
    made = make_case(
        lengths, heads=2, dqk=dim, dv=dim, block_tokens=block_tokens, dtype=dtype, seed=seed
    )
    backend, reference = xformers_paged.XFormersAttention(), TorchReferenceAttention()
    tolerance = 1e-4 if dtype == torch.float32 else 4e-3
    # All queries in tiles; then, as a last layer asks, the last one of each sequence.
    for case in (in_one_pool(made), in_one_pool(made.narrowed(last_rows=True))):
        want = case.widened().attend(reference, RULE)
        got = case.attend(backend, RULE).float()
        assert got.shape == want.shape
        assert ((got - want).abs() <= tolerance).all()


def test_pages_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    case = in_one_pool(make_case([Lengths(20, 5, 0)], dqk=16, dv=16, block_tokens=16))
    keys: list[torch.Tensor] = []
    forward = xformers_paged.fmha.memory_efficient_attention_forward

    def watched(q: torch.Tensor, k: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        keys.append(k)
        attended: torch.Tensor = forward(q, k, *args, **kwargs)
        return attended

    monkeypatch.setattr(xformers_paged.fmha, "memory_efficient_attention_forward", watched)
    case.attend(xformers_paged.XFormersAttention(), RULE)
    assert keys[0].untyped_storage().data_ptr() == case.kv.k.untyped_storage().data_ptr()


def test_steps_of_other_sizes_meet_few_shapes() -> None:
    # Triton compiles the kernel for each number of sequences and each width of the block table.
    shapes = set()
    for rows in range(17, 65):
        case = make_case([Lengths(0, rows, 0), Lengths(3, 9, 0)], dqk=16, dv=16, block_tokens=16)
        plan = xformers_paged._make_plan(case.batch, 16, 4)
        shapes.add(tuple(plan.bias.block_tables.shape))
    assert shapes == {(4, 2), (4, 4), (8, 4)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": AttentionRule(weights="silu", scale=1.0)}, "SiLU"),
        ({"rule": dataclasses.replace(RULE, window=3)}, "mask"),
        ({"rule": dataclasses.replace(RULE, num_open_rows=3)}, "mask"),
        ({"candidates_in_sequence": True}, "mask"),
        ({"dqk": 25, "dv": 25}, "dqk 25 and dv 25"),
        ({"dv": 32}, "dqk 16 and dv 32"),
        ({"dtype": torch.float32}, "bfloat16 or float16 on cuda, not in float32"),
        ({"block_tokens": 24}, "block_tokens in multiples of 16, not 24"),
        ({"page_bytes": 4096 + 256}, "4352 bytes are no multiple of the 1024"),
    ],
)
def test_what_it_cannot_do_is_refused_at_start(changes: dict[str, object], message: str) -> None:
    assert xformers_paged.refusal(SHAPE, CUDA) is None
    shape = dataclasses.replace(SHAPE, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        attention_backend("xformers", CUDA, shape)


def test_a_cpu_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dataclasses.replace(SHAPE, dtype=torch.float32)
    assert xformers_paged.refusal(shape, CPU) is None
    monkeypatch.setattr(xformers_paged, "INTERPRETED", False)
    with pytest.raises(ValueError, match="works on cuda"):
        attention_backend("xformers", CPU, shape)


def test_candidates_among_the_rows_and_pages_of_other_shapes_are_refused() -> None:
    backend = xformers_paged.XFormersAttention()
    with_candidates = make_case([Lengths(0, 5, 2)], dqk=16, dv=16, block_tokens=16)
    with pytest.raises(ValueError, match="no candidates"):
        with_candidates.attend(backend, RULE)
    uneven = make_case([Lengths(0, 5, 0)], dqk=16, dv=32, block_tokens=16)
    with pytest.raises(ValueError, match="pages of whole layers"):
        uneven.attend(backend, RULE)


def test_an_engine_gives_the_same_scores_with_it_and_reuses_prefixes(tmp_path: Path) -> None:
    config = toy_config("sasrec", num_heads=1, dqk=16, dv=16, num_layers=2, max_sequence_len=64)
    path = write_toy_model(tmp_path, config)
    rng = np.random.default_rng(0)
    items = rng.integers(1, 61, (2, 50))
    answers, reused = [], []
    for name in ("torch", "xformers"):
        engine_config = dataclasses.replace(
            toy_engine_config(path, block_tokens=16, max_num_batched_tokens=30),
            executor=ExecutorConfig(attention_backend=name),
        )
        recommender = Recommender.from_config(engine_config)
        scores = []
        for length in (20, 50):  # Chunks of a step's budget, then those behind a cached prefix.
            found = recommender.recommend_batch(
                {
                    "user": f"u{user}",
                    "history": {"item_ids": ids[:length].tolist()},
                    "candidates": {"item_ids": list(range(1, 61))},
                }
                for user, ids in enumerate(items)
            )
            scores += [{one.item_id: one.score for one in answer.data} for answer in found]
            reused.append([answer.usage.cached_tokens for answer in found])
        answers.append(np.array([[one[item] for item in range(1, 61)] for one in scores]))
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-4)
    assert reused[3] == reused[1] == [16, 16]
