"""Random models, engines and streams of visits, drawn by Hypothesis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from model_executor.capabilities import capabilities_of, step_rules
from model_executor.model_config import ModelConfig
from tests.toy_models import toy_config


@dataclass(frozen=True)
class Scenario:
    """One model in one engine, and how many users come how often."""

    config: ModelConfig
    engine: dict[str, Any]
    seed: int
    num_users: int
    num_rounds: int


def _contextual(draw: st.DrawFn, minima: list[int]) -> list[dict[str, Any]]:
    """Features with tables in the pool and small ones, and their minima of a sequence's length."""
    sizes = draw(st.lists(st.sampled_from([5, 11, 5000]), max_size=3))
    return [
        {
            "name": f"about_{place}",
            "num_rows": size,
            "min_sequence_len": draw(st.sampled_from(minima)),
        }
        for place, size in enumerate(sizes)
    ]


def _stu(draw: st.DrawFn) -> dict[str, Any]:
    num_features = draw(st.integers(0, 2))
    return {
        "table_dim": draw(st.sampled_from([8, 11])),
        "features": [{"name": f"of_{place}", "num_rows": 6} for place in range(num_features)],
        "contextual": _contextual(draw, [0, 15, 25]),
        "rank_by": draw(st.sampled_from([None, "dwell"])),
        "num_action_bits": draw(st.integers(1, 6)),
        "num_positions": draw(st.sampled_from([12, 64])),
        "num_time_buckets": draw(st.sampled_from([3, 40])),
        "group_norm": draw(st.booleans()),
        "attention_scale": draw(st.sampled_from([None, 0.3])),
        "max_attention_window": draw(st.sampled_from([0, 1, 7])),
        "contextual_rows_see_history": draw(st.booleans()),
    }


def _nvidia(draw: st.DrawFn) -> dict[str, Any]:
    width = draw(st.integers(4, 6))
    actions = draw(st.sampled_from([None, {"name": "action", "num_rows": 9}]))
    return {
        "dqk": width,
        "dv": width,
        "contextual": _contextual(draw, [0]) if draw(st.booleans()) else [],
        "rank_by": draw(st.sampled_from([None, "like"])),
        "num_position_buckets": draw(st.sampled_from([9, 64])),
        "scaling_seqlen": draw(st.sampled_from([10, 60])),
        "target_group_size": draw(st.sampled_from([1, 1, 2, 3, 5])),
        "action": actions,
        "prediction_head": draw(st.sampled_from([[2], [7, 2], [6, 5, 2]])),
    }


def _research(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "max_output_len": draw(st.integers(0, 5)),
        "num_time_buckets": draw(st.sampled_from([8, 64])),
    }


def _sasrec(draw: st.DrawFn) -> dict[str, Any]:
    return {"ffn_dim": draw(st.integers(6, 16))}


_CHANGES = {"research": _research, "stu": _stu, "nvidia": _nvidia, "sasrec": _sasrec}


@st.composite
def models(draw: st.DrawFn, dialect: str) -> ModelConfig:
    """A model of random size and with random options."""
    max_sequence_len = draw(st.sampled_from([7, 16, 24]))
    changes = {
        "num_layers": draw(st.integers(1, 3)),
        "num_heads": draw(st.integers(1, 3)),
        "embedding_dim": draw(st.sampled_from([8, 12, 15])),
        "dqk": draw(st.integers(1, 6)),
        "dv": draw(st.integers(4, 6)),
        # Where a row reads little, smaller ones make much of the rounding of fp32.
        "layer_norm_eps": 1e-4,
        "max_sequence_len": max_sequence_len,
        "anchor_stride": draw(st.sampled_from([1, 4, max_sequence_len])),
        "truncation": draw(st.sampled_from(["newest", "newest", "oldest"])),
    }
    return toy_config(dialect, **(changes | _CHANGES[dialect](draw)))


@st.composite
def scenarios(draw: st.DrawFn, dialect: str) -> Scenario:
    """A model, and an engine whose pool and budget are hardly more than it needs."""
    config = draw(models(dialect))
    rules = step_rules(config, capabilities_of(config))
    longest = config.max_context_tokens
    block_tokens = draw(st.integers(2, 6))
    fewest_tokens = rules.min_tokens if rules.chunkable else max(rules.min_tokens, longest)
    return Scenario(
        config=config,
        engine={
            "num_pages": 1 + -(-longest // block_tokens) + draw(st.integers(0, 25)),
            "emb_fraction": draw(st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0])),
            "block_tokens": block_tokens,
            "attention": draw(st.sampled_from(["auto", "torch"])),
            "max_num_batched_tokens": max(2, fewest_tokens) + draw(st.integers(0, 60)),
            "max_num_seqs": draw(st.integers(1, 6)),
        },
        seed=draw(st.integers(0, 2**32 - 1)),
        num_users=draw(st.integers(1, 3)),
        num_rounds=draw(st.integers(1, 4)),
    )
