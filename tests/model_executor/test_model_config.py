"""Configurations of all dialects: what each refuses, and the sizes that follow from it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from pydantic import ValidationError

from model_executor.exceptions import ModelDirectoryError
from model_executor.model_config import NvidiaConfig, StuConfig, parse_model_config
from model_executor.models.registry import build_model
from tests.toy_models import TOY_CONFIGS, toy_config

SOURCE = "toy/config.json"

DIMENSION = [0, -1, 65_537, 12.0, "12", True, [12], None]
COUNT = [0, -1, 2**20 + 1, 24.0, "24", True, None]
ROWS = [0, -1, 2**31 - 1, 60.0, "60", True, None]
EPSILON = [0.0, -1e-6, 0.02, math.nan, math.inf, "1e-6", None]
SWITCH = [0, 1, "yes", None]

SHARED: dict[str, list[Any]] = {
    "model_type": ["bert", 1, None],
    "dialect": ["fuxi", "Research", "", 1, None, ["research"]],
    "dtype": ["float16", "bfloat16", 32, None],
    "num_items": ROWS,
    "embedding_dim": DIMENSION,
    "num_layers": [0, 257, 3.0, "3", None],
    "num_heads": [0, 257, 2.0, "2", None],
    "dqk": DIMENSION,
    "dv": DIMENSION,
    "max_sequence_len": COUNT,
    "truncation": ["middle", "Newest", 1, None],
    "anchor_stride": [*COUNT, 25],
    "layer_norm_eps": EPSILON,
}
A, B = {"name": "a", "num_rows": 3}, {"name": "b", "num_rows": 3}
TABLE: list[Any] = [
    "a",
    {"name": "a"},
    {"num_rows": 3},
    {**A, "num_rows": 0},
    {**A, "num_rows": 2**31 - 1},
    {**A, "num_rows": 3.0},
    {**A, "name": ""},
    {**A, "name": "9a"},
    {**A, "name": "a b"},
    {**A, "name": "a.b"},
    {**A, "name": "a" * 65},
    {**A, "name": 7},
    {**A, "size": 3},
]
TABLES: list[Any] = [A, "a", None, [A, A], [A, B, A], *[[B, table] for table in TABLE]]
RANKING: dict[str, list[Any]] = {
    "contextual": [
        *TABLES,
        [{**A, "min_sequence_len": -1}],
        [{**A, "min_sequence_len": 1.5}],
        [{**A, "min_sequence_len": None}],
    ],
    "tasks": [
        [],
        "click",
        None,
        ["click"],
        [{"kind": "binary"}],
        [{"name": "click", "kind": "softmax"}],
        [{"name": "click", "weight": 1.0}],
        [{"name": "to click"}],
        [{"name": "click"}, {"name": "click", "kind": "regression"}],
    ],
    "rank_by": ["absent", "", 0, ["click"]],
}
WRONG_VALUES: dict[str, dict[str, list[Any]]] = {
    "research": {
        **SHARED,
        "max_output_len": [-1, 65_537, 3.0, "3", None],
        "num_time_buckets": [0, 1_025, 64.0, "64", None],
        "l2_norm_eps": EPSILON,
    },
    "stu": {
        **SHARED,
        **RANKING,
        "table_dim": DIMENSION,
        "features": TABLES,
        "num_action_bits": [0, 32, 5.0, "5", True, None],
        "action_dim": DIMENSION,
        "max_candidates": COUNT,
        "num_positions": COUNT,
        "num_time_buckets": COUNT,
        "preprocessor_hidden_dim": DIMENSION,
        "item_hidden_dim": DIMENSION,
        "head_hidden_dim": DIMENSION,
        "mlp_norm_eps": EPSILON,
        "group_norm": SWITCH,
        "attention_scale": [0.0, -0.5, math.nan, math.inf, "1", True],
        "max_attention_window": [-1, 4.0, "4", None],
        "contextual_rows_see_history": SWITCH,
    },
    "nvidia": {
        **SHARED,
        **RANKING,
        # What the reference takes for "the longest of the batch" is no constant of the model.
        "scaling_seqlen": [*COUNT, -1],
        "num_position_buckets": COUNT,
        "target_group_size": COUNT,
        "action": TABLE,
        "prediction_head": [[], [11], [11, 3], [0, 2], [11, 2.0], 2, "2", None],
        "l2_norm_eps": EPSILON,
        "dv": [*DIMENSION, 6],
    },
    "sasrec": {**SHARED, "model_type": ["hstu", 1, None], "ffn_dim": DIMENSION},
}


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ModelDirectoryError) as error:
        parse_model_config(raw, SOURCE)
    return str(error.value)


def names_field(message: str, field: str) -> bool:
    """Whether the message begins with the file and the field, or a place inside of it."""
    pattern = rf"{SOURCE}: (config: Value error, )?{field}(\.[\w.]+)?: "
    return re.match(pattern, message) is not None


# ---------------------------------------------------------------- wrong values


@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_wrong_values_are_tried_for_every_field(dialect: str) -> None:
    assert WRONG_VALUES[dialect].keys() == type(toy_config(dialect)).model_fields.keys()


@pytest.mark.parametrize(
    ("dialect", "field", "value"),
    [
        (dialect, field, value)
        for dialect, fields in WRONG_VALUES.items()
        for field, values in fields.items()
        for value in values
    ],
)
def test_wrong_value_is_refused_by_file_and_field(dialect: str, field: str, value: object) -> None:
    message = refusal({**TOY_CONFIGS[dialect], field: value})
    assert names_field(message, field), message


@pytest.mark.parametrize(
    ("dialect", "field"),
    [
        (dialect, name)
        for dialect in TOY_CONFIGS
        for name, field in type(toy_config(dialect)).model_fields.items()
        if field.is_required()
    ],
)
def test_missing_field_is_refused_by_file_and_field(dialect: str, field: str) -> None:
    rest = {name: value for name, value in TOY_CONFIGS[dialect].items() if name != field}
    message = refusal(rest)
    assert names_field(message, field), message


@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_field_of_another_dialect_is_refused_by_name(dialect: str) -> None:
    known = type(toy_config(dialect)).model_fields
    for other, config in TOY_CONFIGS.items():
        for field in config.keys() - known.keys():
            message = refusal({**TOY_CONFIGS[dialect], field: config[field]})
            assert names_field(message, field), (other, message)


def test_several_wrong_values_are_all_named() -> None:
    message = refusal({**TOY_CONFIGS["stu"], "dqk": 0, "table_dim": "wide", "num_head": 2})
    assert all(f"{field}: " in message for field in ("dqk", "table_dim", "num_head"))


@pytest.mark.parametrize(
    ("dialect", "changes"),
    [
        ("research", {"anchor_stride": 24, "truncation": "oldest", "max_output_len": 0}),
        ("stu", {"attention_scale": 0.25, "rank_by": "dwell", "num_action_bits": 31}),
        ("stu", {"features": [], "contextual": [], "rank_by": None, "attention_scale": None}),
        ("stu", {"contextual": [{"name": "_9", "num_rows": 2**31 - 2, "min_sequence_len": 0}]}),
        ("nvidia", {"action": None, "target_group_size": 7, "prediction_head": [2]}),
        ("nvidia", {"tasks": [{"name": "a" * 64}], "prediction_head": [1], "rank_by": None}),
        ("sasrec", {"dqk": 65_536, "num_layers": 256, "layer_norm_eps": 1e-2}),
    ],
)
def test_values_at_the_limits_are_accepted(dialect: str, changes: dict[str, Any]) -> None:
    config = toy_config(dialect, **changes)
    assert config.model_dump(exclude_unset=True) == {**TOY_CONFIGS[dialect], **changes}


def test_config_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        toy_config("stu").num_items = 3


# ---------------------------------------------------------------- tables


def tables_of(dialect: str, **changes: Any) -> list[tuple[str, int, int]]:
    tables = toy_config(dialect, **changes).row_tables
    return [(table.name, table.num_rows, table.first_row) for table in tables]


def contextual(**sizes: int) -> list[dict[str, Any]]:
    return [{"name": name, "num_rows": size} for name, size in sizes.items()]


@pytest.mark.parametrize(
    ("dialect", "rows"), [("research", 61), ("sasrec", 61), ("stu", 60), ("nvidia", 60)]
)
def test_retrieval_models_keep_a_padding_row_before_their_items(dialect: str, rows: int) -> None:
    changes: dict[str, Any] = {"contextual": []} if dialect == "stu" else {}
    assert tables_of(dialect, **changes) == [("item_embedding", rows, 0)]
    assert toy_config(dialect, **changes).num_rows == rows
    assert toy_config(dialect).first_item_id == rows - 60


@pytest.mark.parametrize("dialect", ["stu", "nvidia"])
def test_tables_beyond_4096_rows_lie_behind_the_items_in_the_pool(dialect: str) -> None:
    features = contextual(city=4097, device=4096, user=9000, age=1)
    assert tables_of(dialect, contextual=features) == [
        ("item_embedding", 60, 0),
        ("contextual.city", 4097, 60),
        ("contextual.user", 9000, 60 + 4097),
    ]
    assert toy_config(dialect, contextual=features).num_rows == 60 + 4097 + 9000


@pytest.mark.parametrize("dialect", ["stu", "nvidia"])
def test_tables_of_up_to_4096_rows_are_dense_weights_and_larger_ones_are_none(dialect: str) -> None:
    features = contextual(city=4097, device=4096, user=9000, age=1)
    weights = build_model(toy_config(dialect, contextual=features)).state_dict()
    width = {"stu": 10, "nvidia": 12}[dialect]
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    found = {
        rows: sum(shape == (rows, width) for name, shape in shapes.items() if "table_" in name)
        for rows in (1, 60, 4096, 4097, 9000)
    }
    assert found == {1: 1, 60: 0, 4096: 1, 4097: 0, 9000: 0}


@pytest.mark.parametrize(("dialect", "width"), [("research", 12), ("stu", 10), ("nvidia", 12)])
def test_rows_are_as_wide_as_the_models_tables(dialect: str, width: int) -> None:
    assert toy_config(dialect).row_dim == width


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("dialect", "changes", "tokens"),
    [
        ("research", {}, 24),
        ("sasrec", {"max_sequence_len": 7}, 7),
        ("stu", {}, 2 + 24),
        ("stu", {"contextual": []}, 24),
        ("nvidia", {}, 2 * 24),
        ("nvidia", {"action": None}, 24),
        ("nvidia", {"contextual": contextual(a=3, b=9000, c=1)}, 3 + 2 * 24),
        ("nvidia", {"action": None, "contextual": contextual(a=3, b=9000, c=1)}, 3 + 24),
    ],
)
def test_longest_context_counts_contextual_tokens_and_the_tokens_of_each_event(
    dialect: str, changes: dict[str, Any], tokens: int
) -> None:
    assert toy_config(dialect, **changes).max_context_tokens == tokens


@pytest.mark.parametrize(
    ("dialect", "changes", "elements"),
    [
        ("research", {}, 3 * 2 * (4 + 6)),
        ("stu", {"num_layers": 1}, 2 * (4 + 6)),
        ("nvidia", {"num_heads": 3}, 3 * 3 * (5 + 5)),
        ("sasrec", {"dqk": 1}, 3 * 2 * (1 + 6)),
    ],
)
def test_kv_of_a_token_counts_layers_heads_and_both_widths(
    dialect: str, changes: dict[str, Any], elements: int
) -> None:
    assert toy_config(dialect, **changes).kv_elements_per_token == elements


@pytest.mark.parametrize(
    ("dialect", "changes", "number"),
    [
        ("research", {}, 0),
        ("sasrec", {}, 0),
        ("stu", {}, 32),
        ("stu", {"num_action_bits": 1}, 2),
        ("nvidia", {}, 9),
        ("nvidia", {"action": None}, 0),
    ],
)
def test_number_of_actions_is_that_of_masks_or_of_table_rows(
    dialect: str, changes: dict[str, Any], number: int
) -> None:
    assert toy_config(dialect, **changes).num_actions == number


@pytest.mark.parametrize(("rank_by", "place"), [(None, 0), ("click", 0), ("dwell", 1)])
def test_items_are_ranked_by_the_first_task_or_the_named_one(
    rank_by: str | None, place: int
) -> None:
    config = toy_config("stu", rank_by=rank_by)
    assert isinstance(config, StuConfig)
    assert config.rank_task == place


@pytest.mark.parametrize(
    ("dialect", "changes", "normaliser"),
    [
        ("research", {}, 24 + 3),
        ("stu", {}, 24 + 60 + 2),
        ("stu", {"contextual": []}, 24 + 60),
        ("nvidia", {}, 30),
    ],
)
def test_normaliser_is_a_constant_of_the_config(
    dialect: str, changes: dict[str, Any], normaliser: int
) -> None:
    config = toy_config(dialect, **changes)
    assert build_model(config).rule.normaliser == normaliser


def test_candidates_are_rows_of_the_sequence_in_ranking_models_alone() -> None:
    found = {dialect: toy_config(dialect).candidates_in_sequence for dialect in TOY_CONFIGS}
    assert found == {"research": False, "stu": True, "nvidia": True, "sasrec": False}
    config = toy_config("nvidia", target_group_size=5)
    assert isinstance(config, NvidiaConfig)
    assert config.candidate_group_size == 5
