"""Golden weights as checkpoints, converted, served, and held against the golden outputs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helm_engine import Recommender
from model_executor.converters.conversion import Conversion
from model_executor.converters.convert import convert_checkpoint, describe
from model_executor.model_config import SMALL_TABLE_ROWS
from tests.model_executor.golden_checkpoints import (
    COLLECTION,
    CONFIGS,
    FEATURE_MLP,
    STU_TABLE,
    dump_table,
    fused_state,
    golden,
    nvidia_tables,
    research_state,
    stu_parts,
    weights,
    write_config,
    write_nvidia,
    write_research,
    write_stu,
)

POOL_BYTES = 32 << 20


def convert(dialect: str, case: str, source: Path, tmp_path: Path, **changes: Any) -> Conversion:
    return convert_checkpoint(
        dialect, source, tmp_path / "model", write_config(tmp_path, case, **changes)
    )


def scores(recommender: Recommender, request: dict[str, Any]) -> Tensor:
    """Scores of all candidates as sent, float32 [candidates, tasks]."""
    answer = recommender.recommend(request)
    ranked = sorted(answer.data, key=lambda item: item.index)
    return torch.tensor(
        [list(item.task_scores.values()) if item.task_scores else [item.score] for item in ranked]
    )


def check(case: str, got: Tensor, name: str, rtol: float) -> None:
    torch.testing.assert_close(got, golden(case)[name], atol=2e-5, rtol=rtol)


# ---------------------------------------------------------------- research


def test_research_round_trip(tmp_path: Path) -> None:
    case = "research_encoder"
    conversion = convert("research", case, write_research(tmp_path), tmp_path)
    assert conversion.config.model_dump().items() >= {
        "num_items": 300, "num_layers": 2, "dqk": 16, "dv": 16, "max_output_len": 11,
        "num_time_buckets": 128,
    }.items()  # fmt: skip
    assert conversion.dropped["_attn_mask"] == "the causal mask, a constant"
    assert {"epoch", "optimizer_state_dict"} <= conversion.dropped.keys()
    recommender = Recommender(tmp_path / "model", pool_bytes=POOL_BYTES)
    tensors, got = golden(case), []
    for user, length in enumerate(tensors["in.lengths"].tolist()):
        ids, times = tensors["in.ids"][user].tolist(), tensors["in.timestamps"][user].tolist()
        request = {
            "history": {"item_ids": ids[:length], "timestamps": times[:length]},
            "request_time": times[length],
        }
        asked = {"candidates": {"item_ids": tensors["in.candidate_ids"].tolist()}}
        got.append(scores(recommender, request | asked)[:, 0])
        best = recommender.recommend(request | {"top_k": 16, "exclude_history": True}).data
        assert [item.item_id for item in best] == tensors["out.topk_ids"][user].tolist()
    check(case, torch.stack(got), "out.scores", rtol=2e-5)


def test_ddp_prefix_is_optional_and_bfloat16_is_read(tmp_path: Path) -> None:
    state = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in research_state().items()
    }
    convert("research", "research_encoder", write_research(tmp_path, state), tmp_path)
    dense = load_file(tmp_path / "model" / "model.safetensors")
    torch.testing.assert_close(
        dense["layers.1.uvqk"], state["_hstu._attention_layers.1._uvqk"].float(), atol=0, rtol=0
    )
    items = load_file(tmp_path / "model" / "tables.safetensors")["item_embedding"]
    assert torch.equal(items, state["_embedding_module._item_emb.weight"].float())


# ---------------------------------------------------------------- stu


def jagged(case: str, lengths: str, names: dict[str, str]) -> list[dict[str, list[int]]]:
    """Inputs of each user under other names."""
    ends = np.cumsum([0, *golden(case)[lengths].tolist()])
    return [
        {ours: golden(case)[theirs][first:last].tolist() for ours, theirs in names.items()}
        for first, last in itertools.pairwise(ends)
    ]


def streaming_scores(model: Path) -> Tensor:
    """[tasks, candidates of all users]"""
    case = "dlrm_streaming_rows"
    recommender = Recommender(model, pool_bytes=POOL_BYTES)
    history = jagged(
        case,
        "in.uih_lengths",
        {
            "item_ids": "in.item_id",
            "actions": "in.item_weights",
            "timestamps": "in.action_timestamp",
            "item_category_id": "in.item_category_id",
        },
    )
    candidates = jagged(
        case,
        "in.num_candidates",
        {
            "item_ids": "in.item_candidate_id",
            "item_category_id": "in.item_candidate_category_id",
        },
    )
    users = golden(case)["in.user_id"].tolist()
    got = [
        scores(
            recommender,
            # All times of this case are 1.
            {
                "history": events,
                "candidates": items,
                "context": {"user_id": user},
                "request_time": 1,
            },
        )
        for events, items, user in zip(history, candidates, users, strict=True)
    ]
    return torch.cat(got).T


def test_stu_round_trip_with_item_features(tmp_path: Path) -> None:
    case = "dlrm_streaming_rows"
    conversion = convert("stu", case, write_stu(tmp_path, *stu_parts(case)), tmp_path)
    assert conversion.config.normaliser == 51
    assert list(conversion.tables) == ["item_embedding"]
    units = "_hstu_transducer._output_postprocessor._period_units"
    assert conversion.dropped[units] == "a constant of our model"
    check(case, streaming_scores(tmp_path / "model"), "out.preds", rtol=1e-5)


def test_stu_large_contextual_table_is_pooled(tmp_path: Path) -> None:
    case = "dlrm_streaming_rows"
    dense, tables = stu_parts(case)
    padding = torch.randn(SMALL_TABLE_ROWS, 12, generator=torch.Generator().manual_seed(0))
    tables["user_id"] = torch.cat([tables["user_id"], padding])
    conversion = convert("stu", case, write_stu(tmp_path, dense, tables), tmp_path)
    assert list(conversion.tables) == ["item_embedding", "contextual.user_id"]
    pooled = load_file(tmp_path / "model" / "tables.safetensors")
    assert torch.equal(pooled["contextual.user_id"], tables["user_id"])
    check(case, streaming_scores(tmp_path / "model"), "out.preds", rtol=1e-5)


def test_stu_half_precision_and_unsharded_tables(tmp_path: Path) -> None:
    dense, tables = stu_parts("dlrm_streaming_rows")
    tables = {name: table.half() for name, table in tables.items()}
    name = STU_TABLE.format("item_category_id")
    dense[name] = tables.pop("item_category_id")
    source = write_stu(tmp_path, dense, tables)
    convert("stu", "dlrm_streaming_rows", source, tmp_path)
    pooled = load_file(tmp_path / "model" / "tables.safetensors")
    assert torch.equal(pooled["item_embedding"], tables["item_id"].float())
    small = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(small["feature_tables.table_item_category_id"], dense[name].float())


def test_stu_round_trip_with_times_and_tasks(tmp_path: Path) -> None:
    case = "dlrm_times_multitask"
    dense, tables = stu_parts(case)
    # The reference builds this module for models that do not use it.
    for place, shape in enumerate([(24, 0), (24,), (16, 24), (16,)]):
        dense[f"{FEATURE_MLP}.{place}.weight"] = torch.ones(shape)
        dense[f"{FEATURE_MLP}.{place}.bias"] = torch.ones(shape[0])
    conversion = convert("stu", case, write_stu(tmp_path, dense, tables), tmp_path)
    assert conversion.config.normaliser == 37
    assert conversion.dropped[f"{FEATURE_MLP}.0.weight"] == "not used without item features"
    recommender = Recommender(tmp_path / "model", pool_bytes=POOL_BYTES)
    history = jagged(
        case,
        "in.uih_lengths",
        {
            "item_ids": "in.video_id",
            "actions": "in.action_weight",
            "timestamps": "in.action_timestamp",
        },
    )
    candidates = jagged(
        case, "in.num_candidates", {"item_ids": "in.item_video_id", "times": "in.item_query_time"}
    )
    names = [entry["name"] for entry in CONFIGS[case]["contextual"]]
    got = []
    for user, (events, items) in enumerate(zip(history, candidates, strict=True)):
        request = {
            "history": events,
            "request_time": items.pop("times")[0],
            "candidates": items,
            "context": {name: int(golden(case)[f"in.{name}"][user]) for name in names},
        }
        got.append(scores(recommender, request))
    check(case, torch.cat(got).T, "out.preds_table_cap", rtol=1e-5)


# ---------------------------------------------------------------- nvidia


def nvidia_logits(model: Path) -> Tensor:
    case = "nvidia_ranking"
    recommender = Recommender(model, pool_bytes=POOL_BYTES)
    history = jagged(case, "in.history_lengths", {"actions": "in.ids.action"})
    tensors = golden(case)
    # A user's items are those of the history, then the candidates.
    both = tensors["in.history_lengths"] + tensors["in.num_candidates"]
    items = [part.tolist() for part in tensors["in.ids.item"].split(both.tolist())]
    got = []
    for user, (events, ids) in enumerate(zip(history, items, strict=True)):
        length = len(events["actions"])
        request = {
            "history": {**events, "item_ids": ids[:length]},
            "candidates": {"item_ids": ids[length:]},
            "context": {name: int(tensors[f"in.ids.{name}"][user]) for name in ("user0", "user1")},
        }
        got.append(scores(recommender, request))
    return torch.cat(got)


def test_nvidia_round_trip_of_layers_by_head(tmp_path: Path) -> None:
    case = "nvidia_ranking"
    source = write_nvidia(tmp_path, weights(case), nvidia_tables())
    # Sizes of tables that are whole need not be given.
    convert("nvidia", case, source, tmp_path, num_items=None, action={"name": "action"})
    check(case, nvidia_logits(tmp_path / "model"), "out.logits", rtol=2e-5)


def test_nvidia_round_trip_of_fused_layers_and_dumped_tables(tmp_path: Path) -> None:
    case, tables, state = "nvidia_ranking", nvidia_tables(), fused_state()
    small = ["user1", "action", "user0"]
    packed = torch.cat([tables[name] for name in small]).flatten()
    state[COLLECTION.format("data", f"{'/'.join(small)}_weights")] = packed
    state[COLLECTION.format("model", "item.weight")] = torch.zeros(1, 1)
    source = write_nvidia(tmp_path, state)
    ids = torch.randperm(70, generator=torch.Generator().manual_seed(0)).tolist()
    dump_table(source, "item", ids, tables["item"])
    conversion = convert("nvidia", case, source, tmp_path)
    assert conversion.notes == ("table item: 70 of 70 ids have a row, the others are zeros",)
    check(case, nvidia_logits(tmp_path / "model"), "out.logits", rtol=2e-5)


def test_nvidia_native_names(tmp_path: Path) -> None:
    case, state = "nvidia_ranking", {}
    for name, tensor in weights(case).items():
        state[name.replace("._output_layernorm_", "._output_ln_dropout_mul.")] = tensor.bfloat16()
    extra = "_hstu_block._attention_layers.0._linear_uvqk._extra_state"
    source = write_nvidia(
        tmp_path, {**state, extra: torch.empty(0, dtype=torch.uint8)}, nvidia_tables()
    )
    conversion = convert("nvidia", case, source, tmp_path)
    assert conversion.dropped[extra] == "scaling factors of low-precision training"
    dense = load_file(tmp_path / "model" / "model.safetensors")
    norm = state["_hstu_block._attention_layers.2._output_ln_dropout_mul.bias"].float()
    assert torch.equal(dense["layers.2.output_norm.bias"], norm)


def test_nvidia_ids_without_a_row_are_zeros(tmp_path: Path) -> None:
    tables = nvidia_tables()
    source = write_nvidia(
        tmp_path, fused_state(), {name: one for name, one in tables.items() if name != "item"}
    )
    dump_table(source, "item", [0, 7, 69], tables["item"], ranks=4)
    conversion = convert("nvidia", "nvidia_ranking", source, tmp_path)
    items = load_file(tmp_path / "model" / "tables.safetensors")["item_embedding"]
    expected = torch.zeros(70, 24)
    expected[[0, 7, 69]] = tables["item"][[0, 7, 69]]
    assert torch.equal(items, expected)
    assert "3 of 70 ids have a row" in describe(conversion)


def test_a_single_data_parallel_table_says_its_own_size(tmp_path: Path) -> None:
    tables = nvidia_tables()
    state = fused_state()
    for name, table in tables.items():
        state[COLLECTION.format("data", f"{name}_weights")] = table.flatten()
    source = write_nvidia(tmp_path, state)
    contextual = [{"name": "user0"}, {"name": "user1"}]
    convert("nvidia", "nvidia_ranking", source, tmp_path, num_items=None, contextual=contextual)
    items = load_file(tmp_path / "model" / "tables.safetensors")["item_embedding"]
    assert torch.equal(items, tables["item"])


@pytest.mark.parametrize("made", [True, False])
def test_the_target_may_be_an_empty_directory(tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "model").mkdir()
    convert("research", "research_encoder", write_research(tmp_path), tmp_path)
    files = {path.name: path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "tables.safetensors"}
    assert len(set(files.values())) == 1
    assert not list(tmp_path.glob(".model*"))
