"""What cannot be converted is refused by name, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model_executor.converters.convert import convert_checkpoint
from model_executor.converters.errors import CheckpointError
from model_executor.exceptions import ModelDirectoryError
from tests.model_executor.golden_checkpoints import (
    COLLECTION,
    FEATURE_MLP,
    STU_TABLE,
    dump_table,
    fused_state,
    nvidia_tables,
    research_state,
    stu_parts,
    weights,
    write_config,
    write_nvidia,
    write_research,
    write_stu,
)

Tensors = dict[str, Any]


def assert_refused(
    dialect: str,
    case: str,
    source: Path,
    tmp_path: Path,
    message: str,
    fields: Tensors | None = None,
) -> None:
    """Converting is an error of one line, and leaves nothing behind."""
    config = write_config(tmp_path, case, **(fields or {}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((CheckpointError, ModelDirectoryError), match=message) as caught:
        convert_checkpoint(dialect, source, tmp_path / "model", config)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def replacing(name: str, change: Callable[[Any], Any]) -> Callable[[Tensors], None]:
    def apply(state: Tensors) -> None:
        state[name] = change(state[name])

    return apply


def adding(name: str, value: Any) -> Callable[[Tensors], None]:
    return lambda state: state.update({name: value})


def losing(name: str) -> Callable[[Tensors], None]:
    def apply(state: Tensors) -> None:
        del state[name]

    return apply


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


# ---------------------------------------------------------------- research

UVQK = "_hstu._attention_layers.1._uvqk"
ITEMS = "_embedding_module._item_emb.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (losing(UVQK), f"'{UVQK}': is missing"),
        (losing("_hstu._attention_layers.0._o.bias"), r"_o\.bias': is missing"),
        (losing(ITEMS), "_item_emb.weight': is missing"),
        (adding("_hstu._attention_layers.2._uvqk", torch.ones(32, 128)), "layers.2.*is missing"),
        (adding("_ndp_module.x", torch.ones(1)), "'_ndp_module.x': belongs to no model"),
        (adding("_embedding_module._item_id_to_category_id", torch.ones(3)), "belongs to no model"),
        (replacing(UVQK, lambda one: one[:, :-1]), r"shape \[32, 127\], .* needs \[32, 128\]"),
        (replacing(UVQK, lambda one: one[0]), r"has shape \[128\]"),
        (replacing(UVQK, with_nan), f"'{UVQK}': holds values that are not finite"),
        (replacing(ITEMS, with_nan), "_item_emb.weight': holds values that are not finite"),
        (replacing(ITEMS, lambda one: one[:, :30]), "the model needs"),
        (replacing(UVQK, lambda one: one.double()), "is torch.float64"),
        (replacing(UVQK, lambda one: one.int()), "is torch.int32"),
        (replacing(UVQK, lambda one: one.to_sparse()), "torch.sparse_coo"),
        (replacing(UVQK, lambda one: 3), "is a int, not a plain tensor"),
        # The output of concat_ua reads three parts.
        (
            replacing("_hstu._attention_layers.0._o.weight", lambda one: one.repeat(1, 3)),
            "cannot be split among u and v of 96 columns",
        ),
        (
            replacing("_hstu._attention_layers.1._rel_attn_bias._pos_w", lambda one: one[1:]),
            r"_pos_w': has shape \[100\], the model needs \[101\]",
        ),
    ],
)
def test_research_tensors(tmp_path: Path, change: Callable[[Tensors], None], message: str) -> None:
    state = research_state()
    change(state)
    source = write_research(tmp_path, state)
    assert_refused("research", "research_encoder", source, tmp_path, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": None, "l2_norm_eps": None}, r"missing: num_heads, l2_norm_eps \(the"),
        ({"num_heads": 3}, "cannot be split among 3 heads"),
        ({"num_heads": 0}, "num_heads: is 0, must be a whole number"),
        ({"num_heads": "2"}, "num_heads: is '2', must be a whole number"),
        ({"num_heads": True}, "num_heads: is True, must be a whole number"),
        ({"num_items": 301}, "num_items: is 301, the checkpoint says 300"),
        ({"dv": 8}, "dv: is 8, the checkpoint says 16"),
        ({"max_output_len": 10}, "max_output_len: is 10, the checkpoint says 11"),
        ({"max_sequence_len": 52}, "max_sequence_len: is 52, the checkpoint has 51 positions"),
        ({"dialect": "stu"}, "dialect: is 'stu', must be 'research'"),
        ({"dropout": 0.2}, "dropout: Extra inputs"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps: Input should be greater than 0"),
    ],
)
def test_research_fields(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    source = write_research(tmp_path)
    assert_refused("research", "research_encoder", source, tmp_path, message, fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "must hold a JSON object"), ("{", "is not JSON"), (None, "cannot be read: No such")],
)
def test_config_file(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "fields.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint("research", write_research(tmp_path), tmp_path / "model", path)


def test_a_file_without_a_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"epoch": 3}, path)
    assert_refused("research", "research_encoder", path, tmp_path, "no dictionary of tensors under")


# ---------------------------------------------------------------- stu

ROWS = "dlrm_streaming_rows"
PREPROCESSOR = "_hstu_transducer._input_preprocessor"
ACTIONS = f"{PREPROCESSOR}._action_encoder._combined_action_weights"
CONTEXTUAL_BIAS = f"{PREPROCESSOR}._batched_contextual_linear_bias"
UNITS = "_hstu_transducer._output_postprocessor._units_per_period"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replacing(ACTIONS, lambda one: one.flip(0)), r"is \[16, 8, 4, 2, 1\], only"),
        (replacing(UNITS, lambda one: one + 1), r"is \[\[25.0, 8.0\]\], only"),
        (losing(UNITS), "_units_per_period': is missing"),
        (losing("_item_embedding_mlp.3.bias"), "_item_embedding_mlp.3.bias': is missing"),
        (losing(f"{FEATURE_MLP}.1.weight"), "1.weight': is missing"),
        (adding("_interleaver.weight", torch.ones(1)), "'_interleaver.weight': belongs to no"),
        (replacing(f"{FEATURE_MLP}.0.weight", lambda one: one.repeat(1, 2)), r"needs \[32, 12\]"),
        (
            replacing(
                f"{PREPROCESSOR}._batched_contextual_linear_bias", lambda one: one.tile(2, 1)
            ),
            r"has shape \[2, 16\], the model needs \[1, 16\]",
        ),
        (adding(STU_TABLE.format("user_id"), torch.ones(3, 12)), "sparse as well"),
    ],
)
def test_stu_tensors(tmp_path: Path, change: Callable[[Tensors], None], message: str) -> None:
    dense, tables = stu_parts(ROWS)
    change(dense)
    assert_refused("stu", ROWS, write_stu(tmp_path, dense, tables), tmp_path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (losing("user_id"), "there is no table 'user_id'"),
        (losing("item_id"), "one must be left, the items'; left: none"),
        (adding("owner_id", torch.ones(4, 12)), "left: 'item_id', 'owner_id'"),
        (
            replacing("item_id", lambda one: one[:, :10]),
            "has rows of 10 numbers, the model",
        ),
        (replacing("user_id", lambda one: one[0]), "has shape .*, not two dimensions"),
        (replacing("user_id", with_nan), "not finite"),
        (replacing("item_id", with_nan), "not finite"),
        (replacing("item_id", lambda one: one.long()), "is torch.int64"),
        (adding("item.id", torch.ones(4, 12)), "is no embedding table"),
    ],
)
def test_stu_tables(tmp_path: Path, change: Callable[[Tensors], None], message: str) -> None:
    dense, tables = stu_parts(ROWS)
    change(tables)
    assert_refused("stu", ROWS, write_stu(tmp_path, dense, tables), tmp_path, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": None, "max_candidates": None}, r"missing: max_candidates, tasks \(the"),
        ({"tasks": [{"name": "a"}, {"name": "b"}]}, "tasks: names 2, the checkpoint's head has 1"),
        ({"tasks": "rating"}, "tasks: Input should be a valid list"),
        ({"features": []}, "left: 'item_category_id', 'item_id'"),
        ({"contextual": [{"name": "user_id", "num_rows": 4}]}, "is 4, the checkpoint says 3"),
        ({"contextual": [{"name": "user_id"}] * 2}, "contextual: names must differ"),
        ({"contextual": [{"id": "user_id"}]}, "contextual: must hold objects with a name"),
        ({"num_action_bits": 6}, "num_action_bits: is 6, the checkpoint says 5"),
        ({"group_norm": True}, "group_norm: is True, the checkpoint says False"),
    ],
)
def test_stu_fields(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    source = write_stu(tmp_path, *stu_parts(ROWS))
    assert_refused("stu", ROWS, source, tmp_path, message, fields)


def test_stu_features_that_the_config_does_not_name(tmp_path: Path) -> None:
    dense, tables = stu_parts(ROWS)
    del tables["item_category_id"]
    source = write_stu(tmp_path, dense, tables)
    assert_refused("stu", ROWS, source, tmp_path, "reads features", {"features": []})


def test_stu_tasks_in_another_order(tmp_path: Path) -> None:
    tasks = [{"name": "dwell", "kind": "regression"}, *({"name": f"t{n}"} for n in range(7))]
    source = write_stu(tmp_path, *stu_parts("dlrm_times_multitask"))
    assert_refused(
        "stu", "dlrm_times_multitask", source, tmp_path, "binary ones come first", {"tasks": tasks}
    )


@pytest.mark.parametrize("name", ["non_sparse.ckpt", "sparse/.metadata", "sparse/__0_0.distcp"])
def test_stu_files(tmp_path: Path, name: str) -> None:
    source = write_stu(tmp_path, *stu_parts(ROWS))
    (source / name).unlink()
    message = re.escape(Path(name).name) + ".*(No such file|not there)"
    assert_refused("stu", ROWS, source, tmp_path, message)


# ---------------------------------------------------------------- nvidia

RANKING = "nvidia_ranking"
LAYER = "_hstu_block._attention_layers.1"
ENCODER = "_hstu_block._preprocessor._positional_encoder"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.update(weights(RANKING, LAYER)),
            "_linear_proj_weight': is of fused layers, '_hstu_block.* of native ones",
        ),
        (losing(f"{LAYER}._linear_uvqk_bias"), "_linear_uvqk_bias': is missing"),
        (losing("_mlp._mlp.2.bias"), "_mlp._mlp.2.bias': is missing"),
        (losing(f"{ENCODER}._position_embeddings_weight"), "_embeddings_weight': is missing"),
        (adding(f"{ENCODER}._timestamp_embeddings_weight", torch.ones(9, 24)), "time encoding"),
        (
            adding("_hstu_block._preprocessor._item_mlp._mlp.0.bias", torch.ones(24)),
            "belongs to no",
        ),
        (
            replacing(f"{LAYER}._linear_proj_weight", lambda one: one[:20]),
            r"has shape \[20, 24\], the model needs \[24, 24\]",
        ),
    ],
)
def test_nvidia_tensors(tmp_path: Path, change: Callable[[Tensors], None], message: str) -> None:
    state = fused_state()
    change(state)
    assert_refused(
        "nvidia", RANKING, write_nvidia(tmp_path, state, nvidia_tables()), tmp_path, message
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling_seqlen": -1}, "scaling_seqlen: is -1, the longest sequence of each batch"),
        ({"scaling_seqlen": 0}, "scaling_seqlen: Input should be greater"),
        ({"scaling_seqlen": None}, r"missing: scaling_seqlen \(the"),
        ({"num_heads": 7}, "cannot be split among u, v, q and k of 7 heads"),
        ({"tasks": [{"name": "one"}]}, "prediction_head: ends with 8 outputs, there are 1 tasks"),
        ({"action": None}, "left: 'action', 'item'"),
        ({"num_items": 71}, "num_items: is 71, the checkpoint says 70"),
        ({"action": [{"name": "action"}]}, "action: must hold objects with a name"),
        ({"contextual": {"name": "user0"}}, "contextual: must hold objects with a name"),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_nvidia_fields(tmp_path: Path, fields: dict[str, Any], message: str, fused: bool) -> None:
    state = fused_state() if fused else weights(RANKING)
    source = write_nvidia(tmp_path, state, nvidia_tables())
    assert_refused("nvidia", RANKING, source, tmp_path, message, fields)


def test_nvidia_files_of_several_ranks(tmp_path: Path) -> None:
    source = write_nvidia(tmp_path, fused_state(), nvidia_tables())
    torch.save({}, source / "torch_module" / "model.1.pth")
    assert_refused("nvidia", RANKING, source, tmp_path, "holds 2 files of ranks")


def test_nvidia_sizes_that_no_file_says(tmp_path: Path) -> None:
    tables, state = nvidia_tables(), fused_state()
    packed = torch.cat([tables["user0"], tables["user1"], tables["action"]])
    state[COLLECTION.format("data", "user0/user1/action_weights")] = packed.flatten()
    source = write_nvidia(tmp_path, state)
    dump_table(source, "item", [1, 2], tables["item"])
    say = "nvidia", RANKING, source, tmp_path
    assert_refused(*say, r"missing: num_items \(the", {"num_items": None})
    assert_refused(*say, "id 2 is outside the 2 rows", {"num_items": 2})
    assert_refused(*say, "rows of item: are '70'", {"num_items": "70"})
    action: Tensors = {"name": "action"}
    assert_refused(*say, r"missing: num_rows of action \(the", {"action": action})
    action["num_rows"] = 8
    assert_refused(*say, r"has 31 rows, the config .* 11 \+ 11 \+ 8", {"action": action})


def test_nvidia_table_in_two_places(tmp_path: Path) -> None:
    source = write_nvidia(tmp_path, fused_state(), nvidia_tables())
    dump_table(source, "item", [1], nvidia_tables()["item"])
    assert_refused("nvidia", RANKING, source, tmp_path, "table 'item' is in another file as well")


def test_nvidia_whole_table_beside_a_dump(tmp_path: Path) -> None:
    tables, name = nvidia_tables(), COLLECTION.format("model", "item.weight")
    state = {**fused_state(), name: tables["item"]}
    source = write_nvidia(tmp_path, state, {one: tables[one] for one in tables if one != "item"})
    dump_table(source, "item", [1], tables["item"])
    assert_refused("nvidia", RANKING, source, tmp_path, "table 'item' is in another file as well")


def test_nvidia_width_of_a_table(tmp_path: Path) -> None:
    tables = {**nvidia_tables(), "user1": torch.ones(11, 20)}
    source = write_nvidia(tmp_path, fused_state(), tables)
    assert_refused("nvidia", RANKING, source, tmp_path, "'user1': has rows of 20 numbers")


def test_nvidia_damaged_tables_file(tmp_path: Path) -> None:
    source = write_nvidia(tmp_path, fused_state())
    (source / "tables.safetensors").write_bytes(b"{}")
    assert_refused("nvidia", RANKING, source, tmp_path, r"tables\.safetensors: cannot be read")
    save_file({"item": torch.ones(3)}, source / "tables.safetensors")
    assert_refused(
        "nvidia",
        RANKING,
        source,
        tmp_path,
        r"tables\.safetensors: tensor 'item': has shape",
    )


# ---------------------------------------------------------------- places


def test_places(tmp_path: Path) -> None:
    source, config = write_research(tmp_path), write_config(tmp_path, "research_encoder")
    full = tmp_path / "full"
    full.mkdir()
    (full / "keep").write_text("me")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for target, message in [
        (full, "is not empty"),
        (full / "keep", "is no directory"),
        (link, "is no directory"),
        (tmp_path / "none" / "model", "there is no directory"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint("research", source, target, config)
    assert (full / "keep").read_text() == "me"
    with pytest.raises(CheckpointError, match="gone: is not there"):
        convert_checkpoint("research", tmp_path / "gone", tmp_path / "model", config)
