"""The paged HSTU kernel, in Triton's interpreter, against plain loops and the torch reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from model_executor.attention.backend import AttentionShape
from model_executor.attention.registry import attention_backend
from model_executor.attention.rule import AttentionRule
from tests.model_executor.test_attention import (
    attend_in_a_dense_loop,
    attend_in_pages,
    bias_of,
    make_history,
    make_model,
)
from tests.model_executor.test_attention_rule import (
    CPU,
    LAYER,
    _shares,
    lay_out,
    make_user,
    wanted,
)


@settings(max_examples=60)
@given(scenario=_shares(), block_tokens=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_kernel_equals_plain_loops_under_every_rule(
    scenario: tuple[AttentionRule, list[tuple[int, int, int]]], block_tokens: int, seed: int
) -> None:
    rule, shares = replace(scenario[0], weights="silu"), scenario[1]
    rng = np.random.default_rng(seed)
    users = [make_user(rng, *share) for share in shares]
    arena, batch, (q, k, v) = lay_out(rng, users, block_tokens)
    with torch.inference_mode():
        got = attention_backend("triton", CPU).attend(q, k, v, arena.kv, LAYER, batch, rule)
    np.testing.assert_allclose(got.numpy(), wanted(rule, users), rtol=1e-4, atol=2e-5)


# Without bfloat16: the interpreter multiplies its bits as integers.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_tiles_of_queries_and_of_keys_equal_the_reference(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    rule = AttentionRule("silu", 0.5, normaliser=100, num_open_rows=3, window=90, group_size=3)
    shares = [(0, 150, 20), (170, 0, 70), (0, 3, 0)]
    users = [make_user(rng, *share) for share in shares]
    arena, batch, rows = lay_out(rng, users, 7)
    kv = replace(arena.kv, k=arena.kv.k.to(dtype), v=arena.kv.v.to(dtype))
    q, k, v = (part.to(dtype) for part in rows)
    # The reference in float32 over the same rounded numbers: the kernel sums in float32 too.
    exact = replace(kv, k=kv.k.float(), v=kv.v.float())
    reference, kernel = (attention_backend(name, CPU) for name in ("torch", "triton"))
    with torch.inference_mode():
        wants = reference.attend(q.float(), k.float(), v.float(), exact, LAYER, batch, rule)
        for _ in range(2):  # The second layer goes by the plan of the first.
            got = kernel.attend(q, k, v, kv, LAYER, batch, rule)
            error = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(got.float(), wants, rtol=error, atol=error)


@settings(max_examples=20)
@given(
    shares=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 10)), min_size=1, max_size=3),
    block_tokens=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_kernel_adds_the_bias_by_position_and_time(
    shares: list[tuple[int, int]], block_tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    model = make_model(seed, 2, 5, 3)
    histories = [make_history(rng, 2, 5, 3, *share) for share in shares]
    got = attend_in_pages(rng, histories, model, block_tokens, "triton")
    wants = [attend_in_a_dense_loop(history, bias_of(model)) for history in histories]
    np.testing.assert_allclose(got.numpy(), np.concatenate(wants), rtol=1e-4, atol=1e-4)


def test_bias_without_the_parts_that_the_kernel_adds_is_refused() -> None:
    rng = np.random.default_rng(0)
    arena, batch, (q, k, v) = lay_out(rng, [make_user(rng, 0, 4, 0)], 2)
    backend, rule = attention_backend("triton", CPU), AttentionRule("silu", 1.0)
    with pytest.raises(TypeError, match="function is no TabledBias"):
        backend.attend(
            q, k, v, arena.kv, LAYER, batch, rule, lambda _, rows, keys: torch.zeros(4, 4)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": AttentionRule("softmax", 1.0)}, "SiLU attention, not softmax"),
        ({"dv": 512}, "at most 256"),
    ],
    ids=["softmax", "wide head"],
)
def test_models_that_the_kernel_does_not_compute_are_refused_at_start(
    change: dict[str, object], message: str
) -> None:
    shape = AttentionShape(
        rule=AttentionRule("silu", 1.0),
        num_heads=2,
        dqk=32,
        dv=32,
        dtype=torch.float32,
        candidates_in_sequence=False,
        block_tokens=16,
        page_bytes=1 << 16,
    )
    attention_backend("triton", CPU, shape)
    with pytest.raises(ValueError, match=message):
        attention_backend("triton", CPU, replace(shape, **change))  # type: ignore[arg-type]
